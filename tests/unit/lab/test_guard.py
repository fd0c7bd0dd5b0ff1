"""Guards: what a lab made is undone when it is killed, whatever it was just doing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from other_processes import needs_root, sleeper, until

from p2pllm_peers.lab.cleanup.claims import Claims, sweep
from p2pllm_peers.lab.cleanup.undo import PATIENCE_S, birth

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def ignores(pid: int, number: int) -> bool:
    """The process has come to where it ignores that signal."""
    mask = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def heard_the_end(guard: int) -> bool:
    """Nobody holds the other end of its standard input any more: it undoes everything, or has done so."""
    try:
        pipe = os.open(f"/proc/{guard}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    try:
        return os.read(pipe, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(pipe)


OWNER = """
import subprocess, sys, time
from pathlib import Path
from p2pllm_peers.lab.cleanup.claims import Claims
claims = Claims.open(Path(sys.argv[1]))
folder = Path(sys.argv[2])
claims.note("folder", str(folder))
folder.mkdir()
prefix = []
if sys.argv[3:]:
    claims.note("namespace", claims.name("x"))
    subprocess.run(["ip", "netns", "add", claims.name("x")], check=True)
    prefix = ["ip", "netns", "exec", claims.name("x")]
child = subprocess.Popen([*prefix, "sleep", "600"])
claims.note("process", str(child.pid))
guard = claims._guard.pid
print(child.pid, guard, claims.id, flush=True)
time.sleep(600)
"""

SLOW_OWNER = """
import sys
from pathlib import Path
from p2pllm_peers.lab.cleanup.claims import Claims
from p2pllm_peers.lab.cleanup.commands import run
with Claims.open(Path(sys.argv[1])) as claims:
    name = claims.name("late")
    claims.note("folder", f"{sys.argv[2]}/{name}")
    claims.note("namespace", name)
    print(claims._guard.pid, name, flush=True)
    run(["sh", "-c", sys.argv[3], sys.argv[2], name])
"""
"""What its command makes it makes only when it is told to."""

MAKE = {
    "folder": 'read line <"$0/fifo"; mkdir "$0/$1"; ls "$0" >"$0/seen"',
    "namespace": 'read line <"$0/fifo"; ip netns add "$1"; ip netns >"$0/seen"',
}


@contextlib.contextmanager
def owner(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, int, str]]:
    """A lab in a process of its own; its child, its guard and its id."""
    words = [sys.executable, "-c", OWNER, str(tmp_path / "ledgers"), str(tmp_path / "made"), *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            child, guard, name = process.stdout.readline().split()
            yield process, int(child), int(guard), name
        finally:
            process.kill()


@contextlib.contextmanager
def slow_owner(tmp_path: Path, kind: str) -> Iterator[tuple[subprocess.Popen[str], int, str, TextIO]]:
    """A lab whose command is under way; its guard, the name of what will be made, and what the command waits for."""
    os.mkfifo(tmp_path / "fifo")
    words = [sys.executable, "-c", SLOW_OWNER, str(tmp_path / "ledgers"), str(tmp_path), MAKE[kind]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            guard, name = process.stdout.readline().split()
            with (tmp_path / "fifo").open("w") as fifo:  # the command has opened its end
                yield process, int(guard), name, fifo
        finally:
            process.kill()


@needs_proc
@pytest.mark.parametrize("kind", ["folder", pytest.param("namespace", marks=[pytest.mark.swarm, needs_root])])
def test_what_a_command_makes_after_the_death_of_its_lab_is_undone(tmp_path, kind):
    with slow_owner(tmp_path, kind) as (process, guard, name, fifo):
        process.kill()
        process.wait()
        assert not heard_the_end(guard)
        assert sweep(tmp_path / "ledgers") == [] and list((tmp_path / "ledgers").iterdir())  # that is for the guard
        fifo.write("go\n")
        fifo.close()
        assert until(lambda: not birth(guard))
    assert name in (tmp_path / "seen").read_text().split()  # it was there
    assert {entry.name for entry in tmp_path.iterdir()} == {"fifo", "seen", "ledgers"}
    assert list((tmp_path / "ledgers").iterdir()) == [] and not (Path("/run/netns") / name).exists()


@needs_proc
def test_a_lab_that_is_interrupted_in_a_command_leaves_nothing(tmp_path):
    with slow_owner(tmp_path, "folder") as (process, guard, _, fifo):
        process.send_signal(signal.SIGINT)
        fifo.close()  # a command that was not ended goes on
        process.wait()
        assert until(lambda: not birth(guard))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"fifo", "seen", "ledgers"}
    assert list((tmp_path / "ledgers").iterdir()) == []


@needs_proc
def test_the_guard_looks_again_when_a_stuck_command_ends(tmp_path, monkeypatch):
    """As one that Ctrl+C made the lab forget in the moment in which it was started."""
    monkeypatch.setattr("p2pllm_peers.lab.cleanup.claims.PATIENCE_S", 0.1)
    os.mkfifo(tmp_path / "fifo")
    claims = Claims.open(tmp_path / "ledgers")
    guard, folder = claims._guard, claims.note("folder", f"{tmp_path}/late")
    words = ["sh", "-c", MAKE["folder"], str(tmp_path), "late"]
    with subprocess.Popen(words, pass_fds=[guard.stdin.fileno()]), (tmp_path / "fifo").open("w"):
        assert claims.release() == [] and claims.ledger.exists()
    assert "late" in (tmp_path / "seen").read_text().split()
    assert guard.wait(PATIENCE_S) == 0
    assert not Path(folder).exists() and not claims.ledger.exists()


@needs_proc
def test_the_guard_undoes_what_a_killed_lab_made(tmp_path):
    with owner(tmp_path) as (process, child, guard, _):
        assert until(lambda: ignores(guard, signal.SIGTERM))  # it does not go before its lab
        os.kill(guard, signal.SIGTERM)
        os.kill(guard, signal.SIGINT)
        process.kill()
        assert until(lambda: not birth(child) and not birth(guard))
    assert not (tmp_path / "made").exists()
    assert list((tmp_path / "ledgers").iterdir()) == []


@pytest.mark.swarm
@needs_root
def test_the_guard_removes_namespaces_with_all_that_runs_in_them(tmp_path):
    with owner(tmp_path, "namespace") as (process, child, guard, name):
        assert (Path("/run/netns") / f"p2pllm-{name}-x").exists()
        process.kill()
        assert until(lambda: not birth(child) and not birth(guard))
    assert not (Path("/run/netns") / f"p2pllm-{name}-x").exists()


@pytest.mark.swarm
@needs_root
def test_a_sweep_comes_after_a_lab_that_was_killed_with_its_guard(tmp_path):
    """Beside it lives another lab, whose namespace and process stay."""
    with Claims.open(tmp_path / "ledgers") as other:
        mine = other.note("namespace", other.name("x"))
        subprocess.run(["ip", "netns", "add", mine], check=True)
        with (
            owner(tmp_path, "namespace") as (process, child, guard, name),
            sleeper("ip", "netns", "exec", mine) as bystander,
        ):
            os.kill(guard, signal.SIGKILL)
            process.kill()
            process.wait()
            assert until(lambda: not birth(guard))
            assert birth(child)
            lines = sweep(tmp_path / "ledgers")
            assert f"namespace p2pllm-{name}-x of lab {name}" in lines
            assert not birth(child) and not (Path("/run/netns") / f"p2pllm-{name}-x").exists()
            assert bystander.poll() is None and (Path("/run/netns") / mine).exists()
        assert other.release() == []
        assert not (Path("/run/netns") / mine).exists()
