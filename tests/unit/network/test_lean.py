"""The daemon's process loads neither torch nor what of hivemind it does not use."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(program: str) -> list[str]:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_daemon_loads_no_torch():
    printed = run("""
        import sys
        from p2pllm_peers.daemon import _load_libraries
        _load_libraries()
        from p2pllm.network.dht import Directory
        print(*({"torch", "scipy", "hivemind.averaging", "hivemind.dht.node"} & set(sys.modules)))
    """)
    assert printed == ["hivemind.dht.node"]


@pytest.mark.parametrize(
    "change", ["_NAMES['serializer'] = ('Gone',)", "_PACKAGES = (*lean._PACKAGES, 'hivemind.gone')"]
)
def test_an_unknown_hivemind_is_imported_whole(change: str):
    printed = run(f"""
        import sys
        from p2pllm.network import lean
        lean.{change}
        print(lean.load_lean(), "hivemind" in sys.modules)
        import hivemind.dht.node
        print("hivemind.averaging" in sys.modules)
    """)
    assert printed == ["False", "False", "True"]


def test_whoever_has_hivemind_keeps_it():
    printed = run("""
        import hivemind
        from p2pllm.network.lean import load_lean
        print(load_lean(), hivemind.Optimizer.__name__)
    """)
    assert printed == ["False", "Optimizer"]
