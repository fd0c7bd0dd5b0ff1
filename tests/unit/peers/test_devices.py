"""Devices: several workers are one peer, with one update that weighs what each of them gathered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pllm.errors import OutOfMemoryError, P2PLLMError, SettingsError, VersionError, WorkerError
from p2pllm.rounds.update import Update
from p2pllm.settings import PeerSettings, load_settings
from p2pllm_peers import devices
from p2pllm_peers.devices import Devices


class Worker:
    """One device that gathers what the test says."""

    made: list[Worker]

    def __init__(self, settings: PeerSettings, *_: Any, workers: int) -> None:
        self.settings, self.workers = settings, workers
        self.notice, self.asked = "", 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.params = np.zeros(4, np.float32)
        self.update: Update | None = None
        self.own_steps: list[int] = []
        self.drawn_for: tuple[str, str] = ("", "")
        self.told: list[tuple[str, Any]] = []
        self.pid, self.tokens, self.tokens_per_s, self.restarts = 7 + len(Worker.made), 10, 2.5, 1
        self.device, self.ready, self.samples = settings.device, False, 3
        Worker.made.append(self)

    def belongs_to(self, run_id: str, peer_id: str, folder: Path) -> None:
        assert folder.is_dir()
        self.drawn_for = (run_id, peer_id)

    async def begin(self, round_number: int) -> None:
        self.told.append(("begin", self.params.copy()))

    async def finish(self, go_on: bool) -> Update | None:
        return self.update

    async def wait_ready(self) -> None:
        if self.failed.done():
            self.failed.result()

    async def evaluate(self) -> float | None:
        self.asked += 1
        return float(self.params.sum())

    async def give_up(self) -> None:
        self.told.append(("give_up", None))

    async def share(self, share: float, cores: float | None) -> None:
        self.told.append(("share", (share, cores)))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    monkeypatch.setattr(Worker, "made", [], raising=False)
    monkeypatch.setattr(devices, "ComputeProcess", Worker)
    return Worker.made


def three(tmp_path: Path) -> Devices:
    return Devices(load_settings(device="cuda:0,cuda:1,cpu"), tmp_path, lambda: None, lambda text: None)


async def test_their_update_is_the_mean_weighed_by_samples(tmp_path: Path, workers: list[Worker]) -> None:
    peer = three(tmp_path)
    assert [worker.settings.device for worker in workers] == ["cuda:0", "cuda:1", "cpu"]
    assert peer.samples == 9 and peer.tokens == 30 and peer.tokens_per_s == 7.5 and peer.restarts == 3
    assert peer.pids == {7, 8, 9} and peer.device == "cuda:0, cuda:1, cpu"
    workers[0].update = Update(30, 2.0, np.full(4, 1.0, np.float32))
    workers[2].update = Update(10, 4.0, np.full(4, 5.0, np.float32))
    workers[0].own_steps, workers[1].own_steps, workers[2].own_steps = [20, 10], [99], [10]
    whole = await peer.finish()
    assert whole is not None and (whole.samples, whole.loss) == (40, 2.5)
    assert np.allclose(whole.vector, 2.0) and peer.own_steps == [20, 10, 10]
    workers[0].update = workers[2].update = None
    assert await peer.finish() is None


async def test_all_begin_at_the_state_and_draw_other_samples(tmp_path: Path, workers: list[Worker]) -> None:
    peer = three(tmp_path)
    peer.belongs_to("run", "peer", tmp_path)
    assert len({worker.drawn_for for worker in workers}) == 3
    peer.params[:] = 3.0
    await peer.begin(1)
    assert all(np.all(worker.told[0][1] == 3.0) for worker in workers)
    await peer.share(0.5, 1.5)
    assert all(worker.told[-1] == ("share", (0.5, 0.5)) for worker in workers)


async def test_one_that_is_up_is_enough(tmp_path: Path, workers: list[Worker]) -> None:
    peer = three(tmp_path)
    assert not peer.ready
    workers[1].ready = True
    assert peer.ready


async def test_those_that_live_go_on_without_one_that_failed(tmp_path: Path, workers: list[Worker]) -> None:
    peer = three(tmp_path)
    workers[0].failed.set_exception(OutOfMemoryError("It died."))
    await peer.wait_ready()
    assert not peer.failed.done()
    assert peer.notice == "The device cuda:0 failed, and the others go on without it until the next start: It died."
    assert peer.device == "cuda:1, cpu"
    assert workers[0].told == [("give_up", None)], "it may only be slow, and must not join in later"
    peer.params[:] = 2.0
    assert await peer.evaluate() == 8.0 and workers[1].asked == 1, "by another, of the state's parameters"
    await peer.share(1.0, 3.0)
    assert workers[2].told[-1] == ("share", (1.0, 1.5))
    workers[2].failed.set_exception(WorkerError("It died, too."))
    await peer.wait_ready()
    workers[1].notice = "Memory is short."
    assert "device cpu failed" in peer.notice and peer.notice.endswith("Memory is short.")
    workers[1].failed.set_exception(WorkerError("The last one died."))
    with pytest.raises(WorkerError, match="The last one"):
        await peer.failed
    with pytest.raises(WorkerError, match="The last one"):
        await peer.wait_ready()


@pytest.mark.parametrize("error", [VersionError("Another model."), SettingsError("No such device.")])
async def test_what_concerns_all_devices_ends_the_peer(
    tmp_path: Path, workers: list[Worker], error: P2PLLMError
) -> None:
    peer = three(tmp_path)
    workers[1].failed.set_exception(error)
    with pytest.raises(type(error)):
        await peer.failed


async def test_processors_are_shared_out(tmp_path: Path, workers: list[Worker]) -> None:
    Devices(load_settings(device="cpu,cpu,cuda"), tmp_path, lambda: None, lambda text: None)
    assert [worker.workers for worker in workers] == [2, 2, 1]
    assert all(worker.settings.threads == 0 for worker in workers), "they mind what others leave"


@pytest.mark.parametrize("wrong", ["", "cpu,", "gpu", "cpu,auto", "cuda:x", "cpu;cpu", "cuda:0,cuda:0"])
def test_devices_that_are_none(wrong: str) -> None:
    with pytest.raises(SettingsError, match="device"):
        load_settings(device=wrong)
