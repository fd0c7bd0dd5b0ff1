"""The worker's process: what it does when its daemon is gone, however early."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from p2pllm_peers.worker_process import KeptWorker, WorkerProcess, shared_file

TIMEOUT_S = 60.0


@pytest.mark.parametrize("heard", ["", '{"draft": {"na'])
async def test_a_worker_whose_daemon_was_killed_before_its_job_ends_and_removes_the_sockets(
    tmp_path: Path, heard: str
) -> None:
    sockets = tmp_path / "runtime"
    sockets.mkdir()
    (sockets / "p2pd.sock").touch()
    memory = shared_file()
    worker = await WorkerProcess.launch(memory, sockets, lambda event: None)
    stdin = worker._process.stdin
    assert stdin is not None
    stdin.write(heard.encode())
    stdin.close()
    async with asyncio.timeout(TIMEOUT_S):
        assert await worker.wait() == 0
    assert not sockets.exists()
    os.close(memory)


async def test_threads_of_a_worker_do_not_spin_for_long_unless_somebody_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert await _environment(tmp_path) >= {"GOMP_SPINCOUNT=1000"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert await _environment(tmp_path) >= {"GOMP_SPINCOUNT=7"}


async def _environment(folder: Path) -> set[str]:
    memory = shared_file()
    worker = await WorkerProcess.launch(memory, folder / "runtime", lambda event: None)
    while not (found := psutil.Process(worker.pid).environ()):  # the system shows none in the moment of its start
        pass
    variables = {f"{name}={value}" for name, value in found.items()}
    worker.kill()
    await worker.wait()
    os.close(memory)
    return variables


class Deaf:
    """A worker that takes no order, as one does that is stopped while its pipe is full."""

    def __init__(self) -> None:
        self.ended, self.asked = asyncio.Event(), asyncio.Event()

    async def send(self, order: object) -> None:
        self.asked.set()
        await asyncio.Event().wait()

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    def kill(self) -> None:
        self.ended.set()


async def test_a_worker_that_starts_while_the_peer_leaves_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [Deaf(), Deaf()]
    coming = iter(workers)

    async def launch(*_: object) -> Deaf:
        return next(coming)

    monkeypatch.setattr(WorkerProcess, "launch", launch)
    kept = KeptWorker(-1, tmp_path, lambda event: None, lambda: [{"draft": {}}], lambda code: True, lambda error: None)
    await kept.launch()
    kept.kill()
    async with asyncio.timeout(TIMEOUT_S):
        await workers[1].asked.wait()
        await kept.close()
        await workers[1].ended.wait()
