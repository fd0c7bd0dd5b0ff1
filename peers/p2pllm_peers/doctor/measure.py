"""Measure: a few seconds of a run's inner work, in the worker that a peer would have.

A child process does it, so that the system's killing it for want of memory is seen, and not what ends the doctor. What
does not live here: what follows from it (`sizes`, `judge`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from p2pllm.averaging.sparse import SparseCodec
from p2pllm.errors import UsageError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings
from p2pllm.state import FLOAT, Layout, SharedState
from p2pllm_peers.compute import ComputeProcess
from p2pllm_peers.doctor.findings import Compute
from p2pllm_peers.worker_process import End

BUILD_S = 60.0
"""A model that is not built, and whose micro-batch is not found, after so long is too large for this machine."""

STEPS_S = 20.0
"""The same for two steps, beside the seconds that are measured."""

MAX_KILLS = 3
"""After which the worker is given up; the micro-batch is halved each time."""

ENCODED = 20_000_000
"""Parameters of which an update is really encoded, to know its size; more would take long and say nothing new."""

_BUILDING = "building the model"


@dataclass(frozen=True)
class Measurement:
    """compute: see there. layout, update: of the model, and its first update, float32; None if it did not compute."""

    compute: Compute
    layout: Layout | None = None
    update: np.ndarray | None = None


class Bench:
    """One worker, asked for a few seconds of work: `launch`, `run`, and in any case `close`."""

    def __init__(self, settings: PeerSettings, folder: Path, progress: Callable[[str], None]) -> None:
        """folder: the doctor's own, into which the worker may write; it removes it if the doctor is killed."""
        self._folder = folder
        self.compute = ComputeProcess(settings, folder, self._changed, self._on_progress)
        self._progress = progress
        self._event = asyncio.Event()
        self._steps: list[tuple[float, int]] = []  # (when, tokens so far)
        self._base = self._a_sample = 0  # bytes before the model; tokens a sample
        self._kills = 0
        self._restarts = 0

    def _on_progress(self, text: str) -> None:
        if text == _BUILDING and self.compute.pid is not None:
            with contextlib.suppress(psutil.Error):
                self._base = psutil.Process(self.compute.pid).memory_info().rss
        self._progress(text)

    def _changed(self) -> None:
        compute = self.compute
        if compute.restarts + 1 > self._restarts and compute.ended not in (None, End.ASKED) and not compute.ready:
            self._restarts = compute.restarts + 1
            if compute.ended is End.OUT_OF_MEMORY:
                self._kills += 1
                self._progress("the system ended the compute process for want of memory; trying a smaller micro-batch")
        if compute.tokens and (not self._steps or self._steps[-1][1] != compute.tokens):
            self._steps.append((time.monotonic(), compute.tokens))
        self._event.set()

    async def launch(self) -> None:
        """Start the process; it loads its libraries while the doctor finds out what to compute."""
        await self.compute.launch()

    async def close(self) -> None:
        """End the process; takes at most 2 seconds."""
        await self.compute.close()

    async def run(self, draft: RunDraft, tokenizer: bytes | None, seconds: float) -> Measurement:
        """Build, find the micro-batch, step for `seconds`. Raises UsageError for a draft that cannot be used."""
        compute = self.compute
        try:
            await self._building(draft, tokenizer)
            found = compute.micro_batch
            compute.belongs_to("0" * 64, "doctor", self._folder)
            self._progress(f"computing with micro-batch {found}")
            await self._stepping(draft, seconds)
            memory = await compute.memory()
            got = await compute.finish()
        except UsageError:
            raise
        except WorkerError as error:
            layout: Layout | None = getattr(compute, "layout", None)  # of a model that was built, at least
            size = 0 if layout is None else layout.size
            failed = Compute(compute.device, killed=self._kills, parameters=size, failure=self._why(error))
            return Measurement(failed, layout)
        update = None if got is None else np.array(got.vector, FLOAT)
        return Measurement(self._found(found, memory), compute.layout, update)

    async def _building(self, draft: RunDraft, tokenizer: bytes | None) -> None:
        """Until the worker is ready, however often it must be started."""
        building = asyncio.create_task(self.compute.build(draft, tokenizer, BUILD_S))
        end = time.monotonic() + BUILD_S
        try:
            while not building.done():
                self._check_kills()
                left = end - time.monotonic()
                if left <= 0:
                    raise WorkerError(f"The model of this run was not built after {BUILD_S:.0f} s.")
                self._event.clear()
                waiting = asyncio.create_task(self._event.wait())
                await asyncio.wait({building, waiting}, timeout=min(left, 1.0), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            building.result()
        finally:
            building.cancel()

    async def _stepping(self, draft: RunDraft, seconds: float) -> None:
        """Steps of a round for about so long, unless a single one would take longer than all of that."""
        compute = self.compute
        samples = compute.micro_batch if draft.round.strategy == "sync" else draft.optimizer.batch
        self._a_sample = draft.data.context_length
        if compute.samples_per_s and samples / compute.samples_per_s > max(seconds, 2.0):
            return  # what a micro-batch took must do
        np.copyto(compute.params, SharedState.initial(compute.layout, compute.params).params)
        await compute.begin(0)
        begun = time.monotonic()
        while True:
            self._check_kills()
            if compute.failed.done():
                compute.failed.result()
            now = time.monotonic()
            if self._has_enough(now, seconds):
                return
            if now > begun + STEPS_S + seconds:
                raise WorkerError(f"A step of this run takes longer than {(STEPS_S + seconds) / 2:.0f} s here.")
            self._event.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._event.wait()

    def _has_enough(self, now: float, seconds: float) -> bool:
        """From the first step to the last, so that what a first step does once does not count."""
        return len(self._steps) > 1 and now >= self._steps[0][0] + seconds

    def _speed(self) -> tuple[float, float]:
        """(tokens, the seconds in which they were computed): of the steps, or of a micro-batch if there are none."""
        if len(self._steps) > 1:
            (begun, before), (ended, after) = self._steps[0], self._steps[-1]
            return after - before, ended - begun
        compute = self.compute
        return compute.micro_batch * self._a_sample, compute.micro_batch / max(compute.samples_per_s, 1e-9)

    def _check_kills(self) -> None:
        if self._kills >= MAX_KILLS:
            raise WorkerError("killed")

    def _why(self, error: WorkerError) -> str:
        if not self._kills:
            return str(error)
        times = "once" if self._kills == 1 else f"{self._kills} times"
        return (
            f"The system ended the compute process {times} for want of memory (signal 9), so this run's model does not "
            f"fit here."
        )

    def _found(self, first_micro_batch: int, memory: dict[str, int]) -> Compute:
        compute = self.compute
        tokens, measured_s = self._speed()
        return Compute(
            device=compute.device,
            micro_batch=compute.micro_batch,
            micro_batch_reduced=compute.micro_batch < first_micro_batch,
            killed=self._kills,
            tokens_per_s=tokens / max(measured_s, 1e-9),
            measured_s=measured_s,
            parameters=compute.layout.size,
            worker_base_bytes=self._base,
            worker_peak_bytes=memory.get("host_peak", 0),
            device_peak_bytes=memory.get("device_peak", 0),
            device_free_bytes=memory.get("device_free", -1),
        )


def encoded_size(layout: Layout, update: np.ndarray) -> int:
    """Bytes of a sparse update of this model, by the codec; of a large one from the tensors that it begins with."""
    entries = [entry for entry in layout.entries if entry.offset + entry.size <= ENCODED] or list(layout.entries[:1])
    part = Layout.of([(entry.name, entry.shape) for entry in entries])
    size = len(SparseCodec(part).encode(np.ascontiguousarray(update[: part.size])))
    return size * layout.size // max(1, part.size)
