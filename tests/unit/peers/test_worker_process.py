"""The worker's process: what it does when its daemon is gone, however early."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from p2pllm.errors import OutOfMemoryError, WorkerError
from p2pllm_peers import worker_process
from p2pllm_peers.vectors import shared_file
from p2pllm_peers.worker_process import MAX_CRASHES, End, KeptWorker, WorkerProcess

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
    for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    assert await _environment(tmp_path) >= {"GOMP_SPINCOUNT=1000", "KMP_BLOCKTIME=0"}
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
    """A worker that takes no order before `listens` is set, as one does that is stopped while its pipe is full."""

    pid, alive = 1, True

    def __init__(self, code: int = -9) -> None:
        self.ended, self.asked, self.listens = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.heard: asyncio.Queue[object] = asyncio.Queue()
        self.code, self.killed = code, False

    async def send(self, *orders: object) -> None:
        if self.ended.is_set():
            raise WorkerError("gone")
        self.asked.set()
        await self.listens.wait()
        for order in orders:
            self.heard.put_nowait(order)

    async def wait(self) -> int:
        await self.ended.wait()
        return self.code

    def kill(self) -> None:
        self.killed = True
        self.ended.set()


def in_turn(monkeypatch: pytest.MonkeyPatch, workers: list[Deaf]) -> None:
    """These are launched, one after the other."""
    coming = iter(workers)

    async def launch(*_: object) -> Deaf:
        return next(coming)

    monkeypatch.setattr(WorkerProcess, "launch", launch)


async def test_a_worker_that_starts_while_the_peer_leaves_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [Deaf(), Deaf()]
    in_turn(monkeypatch, workers)
    kept = KeptWorker(-1, tmp_path, lambda event: None, lambda: [{"draft": {}}], lambda code: True, lambda error: None)
    await kept.launch()
    kept.kill()
    async with asyncio.timeout(TIMEOUT_S):
        await workers[1].asked.wait()
        await kept.close()
        await workers[1].ended.wait()


async def test_a_pause_that_comes_while_a_worker_is_started_again_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [Deaf(), Deaf()]
    in_turn(monkeypatch, workers)
    job, held = {"draft": {}}, {"do": "hold", "held": False}
    kept = KeptWorker(-1, tmp_path, lambda event: None, lambda: [job, dict(held)], lambda end: True, lambda error: None)
    await kept.launch()
    workers[0].ended.set()
    async with asyncio.timeout(TIMEOUT_S):
        await workers[1].asked.wait()
        held["held"] = True
        with pytest.raises(WorkerError):
            await kept.send(held)
        workers[1].listens.set()
        assert [await workers[1].heard.get() for _ in range(2)] == [job, {"do": "hold", "held": True}]
    await kept.close()


@pytest.mark.parametrize(
    ("code", "ours", "end", "said"),
    [
        (-9, False, End.OUT_OF_MEMORY, "for want of memory"),
        (-9, True, End.SILENT, "did not answer"),
        (1, False, End.CRASHED, "code 1"),
    ],
)
async def test_why_a_worker_ended_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, ours: bool, end: End, said: str
) -> None:
    workers = [Deaf(code) for _ in range(MAX_CRASHES + 1)]
    in_turn(monkeypatch, workers)
    for worker in workers:
        worker.listens.set()
        worker.ended.set()
        worker.killed = ours
    monkeypatch.setattr(worker_process, "FIRST_PAUSE_S", 0.0)
    ends: list[End] = []
    failed: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()

    def on_end(end: End) -> bool:
        ends.append(end)
        return True

    kept = KeptWorker(-1, tmp_path, lambda event: None, lambda: [{"draft": {}}], on_end, failed.set_result)
    await kept.launch()
    error = await asyncio.wait_for(failed, TIMEOUT_S)
    assert ends == [end] * (MAX_CRASHES + 1) and said in str(error)
    assert isinstance(error, OutOfMemoryError) == (end is End.OUT_OF_MEMORY)
    await kept.close()


def offered(process: int | str) -> int | None:
    """How gladly the system takes this process when memory runs out, up to 1000; None if it does not tell."""
    file = Path(f"/proc/{process}/oom_score_adj")
    return int(file.read_text()) if file.exists() else None


async def test_a_worker_offers_itself_where_memory_runs_out(tmp_path: Path) -> None:
    own = offered("self")
    if own is None:
        pytest.skip("this system has no such score")
    memory = shared_file()
    worker = await WorkerProcess.launch(memory, tmp_path / "runtime", lambda event: None)
    assert offered(worker.pid) == 1000
    assert offered("self") == own, "but the daemon does not"
    worker.kill()
    await worker.wait()
    os.close(memory)
