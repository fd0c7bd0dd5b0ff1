"""Lean: hivemind's P2P and DHT without the rest of it, for programs that need no more.

`import hivemind`, and with it any of its modules, loads its averaging, experts and optimizers, and those load torch and
SciPy: two seconds and 250 MB of a process that moves bytes. What does not live here: hivemind's use.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys

_PACKAGES = ("hivemind", "hivemind.utils", "hivemind.dht")
"""Whose own `__init__` imports more than is needed."""

_NAMES = {
    "serializer": ("MSGPackSerializer", "SerializerBase"),
    "logging": ("get_logger",),
    "timed_storage": ("get_dht_time",),
}
"""What the modules that are needed import from `hivemind.utils` itself, and where it is."""


def load_lean() -> bool:
    """Make `hivemind.p2p` and `hivemind.dht.node` importable alone; False if they are not, as in an unknown version.

    To be called once, by a program, before anything of hivemind is imported. What is not loaded stays away: whoever
    uses `hivemind.Optimizer` in the same process must not call this.
    """
    if "hivemind" in sys.modules:
        return False
    try:
        for name in _PACKAGES:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ImportError(name)
            package = sys.modules[name] = importlib.util.module_from_spec(spec)  # which is not executed
            above, _, own = name.rpartition(".")
            if above:
                setattr(sys.modules[above], own, package)
        for place, names in _NAMES.items():
            module = importlib.import_module(f"hivemind.utils.{place}")
            for name in names:
                setattr(sys.modules["hivemind.utils"], name, getattr(module, name))
        importlib.import_module("hivemind.dht.node")
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "hivemind"]:
            with contextlib.suppress(KeyError):
                del sys.modules[name]
        return False
    return True
