"""The compute process with a real worker: a model that is built while the daemon already has a state."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from p2pllm.errors import WorkerError
from p2pllm.manifest import DataSection, ModelSection, RunDraft
from p2pllm.settings import PeerSettings
from p2pllm.state import Layout
from p2pllm_peers import questions
from p2pllm_peers.compute import ComputeProcess
from p2pllm_peers.worker_process import End

TIMEOUT_S = 100.0

TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture
def draft(tmp_path: Path) -> RunDraft:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("so it goes on and on. " * 200)
    data = DataSection(source=f"text:{tmp_path}/text", context_length=16, validation_samples=2)
    return RunDraft(model=ModelSection(type="llama", config=TINY), data=data)


@contextlib.asynccontextmanager
async def process(
    folder: Path, heard: asyncio.Event | None = None, micro_batch: int = 0
) -> AsyncIterator[ComputeProcess]:
    """A launched one. heard: set when its samples or its readiness change."""
    (folder / "runtime").mkdir(exist_ok=True)
    settings = PeerSettings(home=folder, cache=folder / "cache", device="cpu", threads=1, micro_batch=micro_batch)
    compute = ComputeProcess(settings, folder / "runtime", (heard or asyncio.Event()).set, lambda text: None)
    await compute.launch()
    compute.belongs_to("ab" * 32, "peer", folder)
    try:
        yield compute
    finally:
        await compute.close()


async def test_a_known_model_need_not_be_waited_for(tmp_path: Path, draft: RunDraft) -> None:
    async with process(tmp_path) as first:
        assert first.remembered_layout(draft) is None
        layout = await first.build(draft, None, TIMEOUT_S)
        assert first.remembered_layout(draft) == layout
    heard = asyncio.Event()
    async with process(tmp_path, heard) as second:
        known = second.remembered_layout(draft)
        assert known is not None
        await second.resume(draft, None, TIMEOUT_S, known)
        assert not second.ready
        await second.park()
        assert second.pid is not None, "a pause must not look like a start that failed"
        second.params[:] = 0.25
        await second.begin(3)
        await asyncio.wait_for(second.wait_ready(), TIMEOUT_S)
        assert np.all(second.params == 0.25), "the worker wrote its initial parameters over the state"
        async with asyncio.timeout(TIMEOUT_S):
            while not second.samples:
                heard.clear()
                await heard.wait()
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert second.pid is not None and os.getpriority(os.PRIO_PROCESS, second.pid) == max(10, own)
        assert second.stand_back(12, io_idle=False), "while it computes"
        assert os.getpriority(os.PRIO_PROCESS, second.pid) == max(12, own)
        update = await second.finish()
        assert update is not None and update.samples > 0 and second.micro_batch > 0
        await second.share(1.0, 1e-6)
        await second.begin(4)
        assert await second.finish() is None, "it rests from the last step"
        await second.share(1.0, None)
        await second.begin(5)
        assert await second.finish() is not None, "its first step is at the end of the round"
        second._micro_batch._again_at = 1.0  # as if memory had run out long ago
        await second.begin(5)
        assert await second.finish() is not None
        assert second.micro_batch > 0 and not second._micro_batch._again_at, "it was measured again"
        given_up = asyncio.create_task(second.memory())
        await asyncio.sleep(0)  # it is asked
        given_up.cancel()
        loss, memory = await asyncio.gather(second.evaluate(), second.memory())  # each gets its own answer
        assert loss == pytest.approx(np.log(257), rel=0.2) and memory and all(memory.values())
        for _ in range(2):  # a pause that lasts asks again
            await second.park()
            assert second.pid is None
        await second.begin(6)
        await asyncio.wait_for(second.wait_ready(), TIMEOUT_S)
        second.params[:] = np.nan
        assert await second.evaluate() is None, "a loss that is no number is none"


async def test_the_systems_kill_halves_the_micro_batch_and_our_own_does_not(
    tmp_path: Path, draft: RunDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = asyncio.Event()

    async def until(what: Callable[[], object]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not what():
                heard.clear()
                await heard.wait()

    async with process(tmp_path, heard, micro_batch=8) as compute:
        await compute.build(draft, None, TIMEOUT_S)
        await compute.begin(0)
        await until(lambda: compute.samples)
        assert compute.micro_batch == 8 and not compute.notice
        assert compute.pid is not None
        os.kill(compute.pid, signal.SIGKILL)
        await until(lambda: not compute.ready)
        assert "micro-batch of 4 instead of 8" in compute.notice and compute.ended is End.OUT_OF_MEMORY
        await until(lambda: compute.samples)
        assert compute.micro_batch == 4
        compute._micro_batch._again_at = 1.0  # long ago
        await compute.begin(1)
        await until(lambda: compute.samples and not compute.notice)
        assert compute.micro_batch == 8, "it was tried again"
        assert await compute.finish() is not None
        monkeypatch.setattr(questions, "MOST_S", 0.1)
        os.kill(compute.pid, signal.SIGSTOP)
        await compute.abandon()
        await until(lambda: not compute.ready)
        assert compute.ended is End.SILENT and not compute.notice
        await until(lambda: compute.ready)
        assert compute.micro_batch == 8 and compute.restarts == 2


@pytest.mark.parametrize(("shape", "said"), [((8, 1), "another number of them"), (None, "version of transformers")])
async def test_another_model_than_the_states_is_refused(
    tmp_path: Path, draft: RunDraft, shape: tuple[int, ...] | None, said: str
) -> None:
    async with process(tmp_path) as compute:
        layout = Layout.of([("other", shape or (built_size(),))])
        await compute.resume(draft, None, TIMEOUT_S, layout)
        with pytest.raises(WorkerError, match=said):
            await asyncio.wait_for(compute.wait_ready(), TIMEOUT_S)


def built_size() -> int:
    """Parameters of the draft's model: embedding and head of 257 tokens, 4 matrices, 3 of the MLP, 3 norms."""
    return 2 * 257 * 8 + 4 * 8 * 8 + 3 * 8 * 8 + 3 * 8


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layout": 7}', '{"layout": "[[1]]"}'])
async def test_a_broken_note_is_no_note(tmp_path: Path, draft: RunDraft, text: str) -> None:
    (tmp_path / "worker.json").write_text(text)
    compute = ComputeProcess(PeerSettings(home=tmp_path), tmp_path, lambda: None, lambda text: None)
    compute.belongs_to("ab" * 32, "peer", tmp_path)
    assert compute.remembered_layout(draft) is None
    await compute.close()
