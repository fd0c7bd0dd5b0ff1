"""What goes wrong with real daemons: one sentence, the right exit code, and nothing left behind.

What a daemon finds wrong on its way into a run is told case by case, and sooner, in `tests/unit/cli`.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from polling import until

from p2pllm_peers.control import ask

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

PROMPT = {"P2PLLM_NICE": "0"}
"""Workers that do not stand back: this machine may be busy with other programs for longer than a test waits."""


def test_run_that_cannot_be_built(peer_env) -> None:
    started = peer_env.p2pllm("start", peer_env.write_run(('"llama"', '"lama"')), **PROMPT)
    peer_env.check_refused(started, 2, ["lama", "llama"])
    peer_env.keeps_nothing()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """A file system of 16 MB, three times what the tiny run needs; False where mounting is not permitted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path]
    mounted = not subprocess.run(command, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            # lazily: a failing test may have left a process in it, which is ended with its machine
            subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(scope="module")
def machine(make_peer_env):
    """A machine whose home is a small disk, if it `has_small_disk`, and whose founder trains the tiny run."""
    env = make_peer_env()
    with small_disk(env.home) as env.has_small_disk:
        started = env.p2pllm("start", env.write_run(), "--detach", **PROMPT)
        assert started.returncode == 0, started.stderr
        yield env
        env.clean()


@pytest.fixture(scope="module")
def stopped(machine):
    """The same machine after its founder has left; the tests with this one come last."""
    if machine.processes():
        assert machine.p2pllm("leave").returncode == 0
    return machine


def test_home_that_becomes_full(machine) -> None:
    if not machine.has_small_disk:
        pytest.skip("mounting is not permitted here")
    filling = machine.home / "filling"
    with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    until(lambda: "free" in status_of(machine)["trouble"], "it takes no part and says why")
    filling.unlink()
    stopped_at = status_of(machine)["round"]
    until(lambda: status_of(machine)["round"] > stopped_at + 3, "it trains on when there is room")
    assert not status_of(machine)["trouble"]
    assert machine.p2pllm("leave").returncode == 0
    assert list(machine.home.glob("runs/*/founder/state/*.safetensors"))
    machine.keeps_nothing(runs=True)


def status_of(machine) -> dict:
    (facts,) = machine.home.glob("runs/*/founder/daemon.json")
    return ask(json.loads(facts.read_text())["socket"], {"do": "status"})


def test_run_that_is_stopped(stopped) -> None:
    run_id = next(stopped.home.glob("runs/*")).name
    assert stopped.p2pllm("status").stdout == f"run {run_id} as 'founder': stopped\n"
    assert json.loads(stopped.p2pllm_here("status", "--json").stdout)["phase"] == "stopped"
    stopped.refuses(1, ["'founder' is not running", run_id], "leave")
    assert "starting the network" in stopped.p2pllm_here("logs", "-n", "1000").stdout
    assert stopped.p2pllm_here("logs", "-n", "0").stdout == ""
    assert stopped.p2pllm_here("generate", "--tokens", "5", "--prompt", "little").stdout.startswith("little")


def test_export_into_a_folder_with_something_in_it(stopped) -> None:
    folder = stopped.folder / "model"
    folder.mkdir()
    (folder / "precious").write_text("work")
    stopped.refuses(2, [str(folder), "empty"], "export", folder)
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_run_or_name_that_is_not_there(stopped) -> None:
    for command in (["status"], ["leave"], ["export", "folder"]):
        stopped.refuses(2, ["begins with zz", "p2pllm status"], *command, "--run", "zz")
        stopped.refuses(2, ["'nobody'", "p2pllm status"], *command, "--name", "nobody")
    stopped.refuses(2, ["begins with zz", "p2pllm status"], "join", "--run", "zz")
