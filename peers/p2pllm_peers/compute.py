"""ComputeProcess: the daemon's worker, fed with a job and asked for updates.

Its process, and starting that again when it dies, is `worker_process`; what it computes is `worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from p2pllm import errors
from p2pllm.errors import VersionError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.rounds.update import Update
from p2pllm.settings import PeerSettings
from p2pllm.state import Layout, moments_of
from p2pllm_peers.micro_batch import MicroBatch
from p2pllm_peers.priority import stand_back
from p2pllm_peers.questions import Patience, Questions
from p2pllm_peers.readiness import Readiness
from p2pllm_peers.remembered import Remembered
from p2pllm_peers.speed import Speed
from p2pllm_peers.standing import Standing
from p2pllm_peers.vectors import SharedVectors
from p2pllm_peers.worker_process import End, Event, KeptWorker

log = logging.getLogger(__name__)

SPEED_WINDOW_S = 30.0
"""Tokens a second are measured over this long."""

_OTHER_MODEL = (
    "The model has other parameters than this run's, so this version of transformers builds it differently; install "
    "the version that the run was founded with."
)


class ComputeProcess:
    """Starts and supervises one worker; implements `p2pllm.rounds.update.Compute`."""

    def __init__(
        self,
        settings: PeerSettings,
        runtime_dir: Path,
        on_change: Callable[[], None],
        on_progress: Callable[[str], None],
        workers: int = 1,
    ) -> None:
        """on_change: called when samples or readiness change. on_progress: called with phrases while it builds.

        workers: of this peer on the processor, among which its cores are shared out.
        """
        self.tokens = 0  # computed so far, those of dropped rounds included
        self.device = self.data_digest = ""
        self.samples_per_s = 0.0  # as the worker found the micro-batch; 0 if it was given one
        self.ended: End | None = None  # why the last process that ended did so
        self.own_steps: list[int] = []
        self._readiness = Readiness()
        self.failed = self._readiness.failed
        self._settings, self._workers = settings, workers
        self._on_change = on_change
        self._on_progress = on_progress
        self._vectors = SharedVectors()
        self._standing = Standing()
        self._worker = KeptWorker(
            self._vectors.handle,
            runtime_dir,
            self._on_event,
            lambda: self._standing.all,
            self._went_down,
            self._readiness.fail,
        )
        self._remembered = Remembered()
        self._micro_batch = MicroBatch(settings.micro_batch)
        self._building: asyncio.Task[None] | None = None
        self._questions, self._patience = Questions(), Patience()
        self._samples = 0
        self._speed = Speed(SPEED_WINDOW_S)

    async def launch(self) -> None:
        """Start the process; it loads its libraries while the daemon finds out what to compute."""
        await self._worker.launch()

    def belongs_to(self, run_id: str, peer_id: str, folder: Path) -> None:
        """Whose samples are drawn, and where what is this peer's own stays from one start to the next."""
        self._standing.draw_for(run_id, peer_id, folder)
        self._remembered.stays_in(folder)
        if self.ready:
            self._remember()

    def remembered_layout(self, draft: RunDraft) -> Layout | None:
        """Of the model as it was built here before; None if it never was."""
        layout = self._remembered.layout
        return None if layout is None else layout.with_moments(moments_of(draft))

    async def build(self, draft: RunDraft, tokenizer: bytes | None, timeout: float) -> Layout:
        """Hand over the job and wait until model and data are ready; `params` then holds the initial parameters.

        Raises what the worker raised, or WorkerError if it dies, or shows no progress for `timeout` seconds.
        """
        await self._send_job(draft, tokenizer, fresh=True)
        await self._readiness.within(timeout)
        self._vectors.map(self.layout)
        self._standing.job["fresh"] = False  # a restarted worker must not overwrite what the run has trained
        return self.layout

    async def resume(self, draft: RunDraft, tokenizer: bytes | None, timeout: float, layout: Layout) -> None:
        """Hand over the job and do not wait: who has a state needs no model to catch up, and loading one takes seconds.

        layout: of the state, float32 of shape (layout.size,) in `params`, which the caller fills. What `build` raises
        ends up in `failed`.
        """
        self.layout = layout
        self._vectors.fit(layout)
        await self._send_job(draft, tokenizer, fresh=False)
        self._building = asyncio.create_task(self._readiness.fail_unless(timeout))

    async def _send_job(self, draft: RunDraft, tokenizer: bytes | None, fresh: bool) -> None:
        self._moments, self._validation_samples = moments_of(draft), draft.data.validation_samples
        job = self._standing.build(
            draft,
            tokenizer,
            self._settings,
            shared_fd=self._vectors.handle,
            fresh=fresh,
            micro_batch=self._micro_batch.start(self._remembered.micro_batch),
            workers=self._workers,
        )
        await self._worker.send(job)
        self._readiness.heard()

    async def wait_ready(self) -> None:
        """Until the worker has built what it computes with. Raises what ended it for good."""
        await self._readiness.wait()

    async def give_up(self) -> None:
        """End the process for good; its memory stays, as the peer's state may be there. It is not ready any more."""
        if self._building is not None:
            self._building.cancel()
        await self._worker.close()

    async def close(self) -> None:
        """End the process and give its memory back, whatever it is doing; takes at most 2 seconds."""
        await self.give_up()
        self._vectors.close()
        self._readiness.seen()

    # -- what the loop uses --------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """The process is up and has a model."""
        return self._readiness.is_ready

    @property
    def params(self) -> np.ndarray:
        """The state's parameters, float32 of shape (layout.size,), shared with the worker."""
        return self._vectors.params

    @property
    def samples(self) -> int:
        """Samples gathered in the round that was begun."""
        return self._samples

    @property
    def micro_batch(self) -> int:
        """Samples that it computes at once; 0: not known yet."""
        return self._micro_batch.size

    @property
    def notice(self) -> str:
        """A sentence for the user while memory is short, else empty."""
        return self._micro_batch.notice

    @property
    def restarts(self) -> int:
        """How often the process had to be started again."""
        return self._worker.restarts

    @property
    def pid(self) -> int | None:
        """Its process id; None while there is none."""
        return self._worker.pid

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed a second of wall time over the last half minute."""
        return self._speed.per_second(time.monotonic())

    async def begin(self, round_number: int) -> None:
        """See Compute."""
        if self._standing.begun is None:
            self._samples = 0
        begin = self._standing.begin(round_number)
        self._worker.wake()
        fit = self._micro_batch.due() if self.ready else None
        with contextlib.suppress(WorkerError):  # it died, or was parked; it begins when it is back
            await self._worker.send(*([fit] if fit else []), begin)

    async def finish(self, go_on: bool = False) -> Update | None:
        """See Compute: None if nothing was gathered or the worker died."""
        begun = self._standing.begun
        answer = await self._ask({"do": "finish", "go_on": go_on})
        self._standing.begun = None
        if go_on and begun and answer:
            self._standing.begin(begun["round"] + 1)
        self._samples = 0
        if answer is None or answer["samples"] < 1:
            return None
        self._worker.forgive()
        self.own_steps = answer["steps"]
        return Update(answer["samples"], answer["loss"], self._vectors.update[: answer["elements"]])

    async def abandon(self) -> None:
        """Drop what was gathered; the worker no longer reads the parameters afterwards."""
        self._standing.begun = None
        await self._ask({"do": "abandon"})

    async def hold(self, held: bool) -> None:
        """See Compute."""
        with contextlib.suppress(WorkerError):  # it died; it is told when it is back
            await self._worker.send(self._standing.hold(held))

    async def share(self, share: float, cores: float | None) -> None:
        """Compute in so much of the time, 0 to 1, take so many cores on average (None: all), and rest in between."""
        with contextlib.suppress(WorkerError):  # it died; it is told when it is back
            await self._worker.send(self._standing.share(share, cores))

    def stand_back(self, nice: int, io_idle: bool) -> bool:
        """Go by these settings; False if the system lets only the next process have that niceness."""
        self._settings = self._settings.model_copy(update={"nice": nice, "io_idle": io_idle})
        return self._stood_back() if self.ready else True  # it is told when it is ready

    def _stood_back(self) -> bool:
        return self.pid is None or stand_back(self.pid, self._settings.nice, self._settings.io_idle)

    async def park(self) -> None:
        """See Compute: the process ends, and keeps what is this peer's own; not before it has been built once."""
        if self._building is not None and not self._building.done():
            return  # the start waits for it, and would take its silence for a failure
        self._standing.begun = None
        await self._worker.park()

    async def evaluate(self) -> float | None:
        """Validation loss of the parameters as they are now, nats a token; None if the worker died.

        None, too, where it is no number, as no JSON that a peer writes or answers could hold it.
        """
        answer = await self._ask({"do": "evaluate"}, self._validation_samples)
        return None if answer is None or not math.isfinite(answer["loss"]) else float(answer["loss"])

    async def memory(self) -> dict[str, int]:
        """Bytes that the process had at most, as `training.device.memory_of` says; empty if it died."""
        answer = await self._ask({"do": "memory"})
        return {} if answer is None else {name: size for name, size in answer.items() if name != "event"}

    # -- the worker ----------------------------------------------------------------------------------------------------

    async def _ask(self, command: Event, samples: int = 0) -> Event | None:
        """Send a command and wait for its answer; None if the worker is not up, dies over it, or does not answer.

        samples: that it computes for the answer.
        """
        if not self.ready:
            return None
        number, answer = self._questions.put()
        patience_s = self._patience.seconds(samples)
        try:
            await self._worker.send(command | {"number": number})
            async with asyncio.timeout(patience_s):
                return await answer
        except WorkerError:
            return None
        except TimeoutError:
            log.error("the worker has not answered `%s` for %.0f s; killing it", command["do"], patience_s)
            self._worker.kill()
            return None
        finally:
            answer.cancel()

    def _on_event(self, event: Event) -> None:
        self._readiness.heard()
        match event["event"]:
            case "progress":
                self._on_progress(event["text"])
            case "ready":
                self._built_is(event)
            case "trying":
                self._micro_batch.trying(event["micro_batch"])
            case "fitted":
                self._fitted(self._micro_batch.again, event)
            case "micro_batch":
                self._fitted(self._micro_batch.shrunk, event)
            case "step" if self._standing.begun is None or event["round"] != self._standing.begun["round"]:
                pass  # of a round that was dropped while the worker was starting
            case "step":
                self._samples = event["samples"]
                self.tokens += event["tokens"]
                self._patience.stepped(event["seconds"], event["computed"])
                self._speed.add(self._readiness.heard_at, event["tokens"])
                self._on_change()
            case "error":
                kind = getattr(errors, event["kind"], WorkerError)
                self._readiness.fail(kind(event["message"]))
            case _:
                self._questions.answer(event.pop("number", None), event)

    def _built_is(self, event: Event) -> None:
        """The worker has its model and its data."""
        layout = Layout.from_json(event["layout"]).with_moments(self._moments)
        if not self._standing.job["fresh"] and layout != self.layout:
            self._readiness.fail(VersionError(_OTHER_MODEL))
            return
        self.layout = layout
        self._fitted(self._micro_batch.found, event)
        self.samples_per_s = event["samples_per_s"]
        self.device, self.data_digest = event["device"], event["data_digest"]
        self._stood_back()  # not before: somebody waits for the start
        self._readiness.set(True)
        self._on_change()

    def _fitted(self, take: Callable[[int], None], event: Event) -> None:
        """The worker computes so many samples at once from now on."""
        before = self.notice
        take(event["micro_batch"])
        self._standing.job["micro_batch"] = self.micro_batch
        if self.notice != before:
            log.warning("%s", self.notice or f"memory suffices for a micro-batch of {self.micro_batch} again")
        self._remember()

    def _remember(self) -> None:
        self._remembered.keep(self.layout, self._micro_batch.kept)

    def _went_down(self, end: End) -> bool:
        """The worker ended, asked or not; whether another one may do better."""
        self.ended = end
        if end is End.OUT_OF_MEMORY and self._standing.job:
            self._lacked_memory()
        self._readiness.set(False)
        self._samples = 0
        self._questions.give_up()
        self._on_change()
        return not self.failed.done()

    def _lacked_memory(self) -> None:
        if self._micro_batch.killed():
            self._worker.forgive()  # a smaller one is an answer; it counts as a failure only where none is left
        self._standing.job["micro_batch"] = self.micro_batch
        log.warning("%s", self.notice)
        if self.ready:
            self._remember()
