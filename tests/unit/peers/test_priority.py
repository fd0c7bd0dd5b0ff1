"""Priority: all threads of a process that runs, both ways, and what only root may do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from p2pllm_peers import priority
from p2pllm_peers.priority import stand_back

OTHER = """
import sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[int]:
    """A process of ours with two threads, in a session of its own like a worker."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=pipe, stdout=pipe, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def niceness(pid: int) -> list[int]:
    return [os.getpriority(os.PRIO_PROCESS, thread) for thread in priority._threads(pid)]


def test_every_thread_stands_back_and_comes_forward_again_if_it_may(other: int):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    if own > 17:
        pytest.skip("these tests run at the lowest priority")
    assert stand_back(other, own + 2, io_idle=False)
    assert niceness(other) == [own + 2] * len(niceness(other))
    assert stand_back(other, own + 1, io_idle=False) == (niceness(other)[0] == own + 1)
    assert len(set(niceness(other))) == 1, "all threads, or none"
    assert not Path("/proc/self/task").exists() or len(niceness(other)) == 2


@pytest.mark.skipif(not hasattr(psutil, "IOPRIO_CLASS_IDLE"), reason="Linux only")
def test_the_disk_for_nobody_else_and_back(other: int):
    before = psutil.Process(other).ionice()
    for idle in (True, False):
        stand_back(other, 0, io_idle=idle)
        found = {psutil.Process(thread).ionice().ioclass for thread in priority._threads(other)}
        assert found == {psutil.IOPRIO_CLASS_IDLE if idle else before.ioclass}


def test_nobody_gets_ahead_of_the_daemon(other: int, monkeypatch: pytest.MonkeyPatch):
    own, asked = os.getpriority(os.PRIO_PROCESS, 0), list[int]()
    monkeypatch.setattr(os, "setpriority", lambda which, who, nice: asked.append(nice))
    assert stand_back(other, 0, io_idle=False) and set(asked) == {max(0, own)}


def test_what_the_system_forbids_is_said_and_changes_nothing(other: int, monkeypatch: pytest.MonkeyPatch):
    def forbids(which: int, who: int, nice: int) -> None:
        raise PermissionError(13, "Permission denied")

    before = niceness(other)
    monkeypatch.setattr(os, "setpriority", forbids)
    assert not stand_back(other, 3, io_idle=False)
    assert niceness(other) == before


def test_a_process_that_has_ended_is_no_matter():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert stand_back(process.pid, 19, io_idle=True)
