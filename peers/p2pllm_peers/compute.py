"""ComputeProcess: the daemon's worker, kept alive: fed with a job, asked for updates, started again when it dies.

One life of it is `worker_process`; what it computes is `worker`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from p2pllm import errors
from p2pllm.errors import P2PLLMError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.rounds.update import Update
from p2pllm.settings import PeerSettings
from p2pllm.state import Layout, moments_of
from p2pllm_peers.speed import Speed
from p2pllm_peers.worker_process import Event, WorkerProcess, shared_file

log = logging.getLogger(__name__)

MAX_CRASHES = 5
"""Deaths without a finished update in between that are forgiven; the next one ends the peer."""

ANSWER_TIMEOUT_S = 120.0
"""A worker that does not answer a command in this time is killed and started again."""

CLOSE_TIMEOUT_S = 2.0
"""A worker that does not end by itself in this time is killed."""

SPEED_WINDOW_S = 30.0
"""Tokens a second are measured over this long."""


class ComputeProcess:
    """Starts and supervises one worker; implements `p2pllm.rounds.update.Compute`."""

    def __init__(
        self,
        settings: PeerSettings,
        runtime_dir: Path,
        on_change: Callable[[], None],
        on_progress: Callable[[str], None],
    ) -> None:
        """on_change: called when samples or readiness change. on_progress: called with phrases while it builds."""
        self.restarts = 0
        self.tokens = 0  # computed so far, those of dropped rounds included
        self.device = self.data_digest = ""
        self.micro_batch = 0
        self.own_steps: list[int] = []
        self.run_id = self.peer_id = ""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._runtime_dir = runtime_dir
        self._on_change = on_change
        self._on_progress = on_progress
        self._memory = shared_file()
        self._worker: WorkerProcess | None = None
        self._watching: asyncio.Task[None] | None = None
        self._job: dict[str, Any] = {}
        self._remembered: Path | None = None
        self._ready = asyncio.Event()
        self._heard = time.monotonic()
        self._answer: asyncio.Future[Event | None] | None = None
        self._begun: Event | None = None
        self._samples = 0
        self._crashes = 0
        self._speed = Speed(SPEED_WINDOW_S)

    async def launch(self) -> None:
        """Start the process; it loads its libraries while the daemon finds out what to compute."""
        self._worker = await WorkerProcess.launch(self._memory, self._on_event)
        self._watching = asyncio.create_task(self._watch())

    async def build(self, draft: RunDraft, tokenizer: bytes | None, remembered: Path | None, timeout: float) -> Layout:
        """Hand over the job and wait until model and data are ready; `params` then holds the initial parameters.

        remembered: file that keeps the micro-batch for the next start. Raises what the worker raised, or WorkerError
        if it dies, or shows no progress for `timeout` seconds.
        """
        self._remembered, self._moments = remembered, moments_of(draft)
        self._job = {
            "draft": draft.model_dump(mode="json", include=set(RunDraft.model_fields)),
            "tokenizer": base64.b64encode(tokenizer).decode() if tokenizer is not None else "",
            "settings": self._settings.model_dump(mode="json"),
            "shared_fd": self._memory,
            "runtime_dir": str(self._runtime_dir),
            "moments": str(remembered.with_name("moments.safetensors")) if remembered else "",
            "fresh": True,
            "micro_batch": self._settings.micro_batch or _recall(remembered),
        }
        await self._send(self._job)
        self._heard = time.monotonic()
        while not self.ready:
            left = self._heard + timeout - time.monotonic()
            if left <= 0:
                raise WorkerError(
                    f"The compute process shows no progress for {timeout:.0f} s; raise startup_timeout_s."
                )
            waiting: asyncio.Future[Any] = asyncio.ensure_future(self._ready.wait())
            either: list[asyncio.Future[Any]] = [waiting, self.failed]
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self.failed.done():
                self.failed.result()
        size = os.fstat(self._memory).st_size // 8
        both = np.frombuffer(mmap.mmap(self._memory, 8 * size), dtype="<f4")
        self.params, self._update = both[:size], both[size:]
        self._job["fresh"] = False  # a restarted worker must not overwrite what the run has trained
        return self.layout

    async def close(self) -> None:
        """End the process and give its memory back, whatever it is doing; takes at most CLOSE_TIMEOUT_S."""
        if self._watching is not None:
            self._watching.cancel()
        if self._worker is not None:
            with contextlib.suppress(WorkerError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._worker.send({"do": "exit"})
                    await self._worker.wait()
            self._worker.kill()
            await self._worker.wait()
        os.close(self._memory)
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()  # seen; the owner may be leaving for another reason

    # -- what the loop uses --------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """The process is up and has a model."""
        return self._ready.is_set()

    @property
    def samples(self) -> int:
        """Samples gathered in the round that was begun."""
        return self._samples

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed a second of wall time over the last half minute."""
        return self._speed.per_second(time.monotonic())

    async def begin(self, round_number: int) -> None:
        """See Compute."""
        if self._begun is None:
            self._samples = 0
        self._begun = self._beginning(round_number)
        with contextlib.suppress(WorkerError):  # it died; it begins again when it is back
            await self._send(self._begun)

    def _beginning(self, round_number: int) -> Event:
        return {"do": "begin", "round": round_number, "run_id": self.run_id, "peer": self.peer_id}

    async def finish(self, go_on: bool = False) -> Update | None:
        """See Compute: None if nothing was gathered or the worker died."""
        begun = self._begun
        answer = await self._ask({"do": "finish", "go_on": go_on})
        self._begun = self._beginning(begun["round"] + 1) if go_on and begun and answer else None
        self._samples = 0
        if answer is None or answer["samples"] < 1:
            return None
        self._crashes = 0
        self.own_steps = answer["steps"]
        return Update(answer["samples"], answer["loss"], self._update[: answer["elements"]])

    async def abandon(self) -> None:
        """Drop what was gathered; the worker no longer reads the parameters afterwards."""
        self._begun = None
        await self._ask({"do": "abandon"})

    async def evaluate(self) -> float | None:
        """Validation loss of the parameters as they are now, nats a token; None if the worker died."""
        answer = await self._ask({"do": "evaluate"})
        return None if answer is None else float(answer["loss"])

    # -- the worker ----------------------------------------------------------------------------------------------------

    async def _send(self, command: Event) -> None:
        if self._worker is None:
            raise WorkerError("The compute process was not started.")
        await self._worker.send(command)

    async def _ask(self, command: Event) -> Event | None:
        """Send a command and wait for its answer; None if the worker is not up, dies over it, or does not answer."""
        if not self.ready or self._worker is None:
            return None
        answer = self._answer = asyncio.get_running_loop().create_future()
        try:
            await self._send(command)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                event: Event | None = await answer
                return event
        except WorkerError:
            return None
        except TimeoutError:
            log.error("the worker does not answer; killing it")
            self._worker.kill()
            return None
        finally:
            self._answer = None

    def _on_event(self, event: Event) -> None:
        self._heard = time.monotonic()
        match event["event"]:
            case "progress":
                self._on_progress(event["text"])
            case "ready":
                self.layout = Layout.from_json(event["layout"]).with_moments(self._moments)
                self.device, self.data_digest = event["device"], event["data_digest"]
                self._found_micro_batch(event["micro_batch"])
                self._ready.set()
                self._on_change()
            case "micro_batch":
                self._found_micro_batch(event["micro_batch"])
            case "step" if self._begun is None or event["round"] != self._begun["round"]:
                pass  # of a round that was dropped while the worker was starting
            case "step":
                self._samples = event["samples"]
                self.tokens += event["tokens"]
                self._speed.add(self._heard, event["tokens"])
                self._on_change()
            case "error":
                kind = getattr(errors, event["kind"], WorkerError)
                if not self.failed.done():
                    self.failed.set_exception(kind(event["message"]))
            case _:
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(event)

    def _found_micro_batch(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch
        if self._remembered is not None and not self._settings.micro_batch:
            with contextlib.suppress(OSError):  # only a hint for the next start
                self._remembered.write_text(json.dumps({"micro_batch": micro_batch}))

    async def _watch(self) -> None:
        """Keep the worker alive; if that cannot be done, the peer must know."""
        try:
            await self._keep_alive()
        except Exception as error:
            log.exception("the worker cannot be supervised")
            if not self.failed.done():
                self.failed.set_exception(WorkerError(f"The compute process cannot be kept alive: {error}."))

    async def _keep_alive(self) -> None:
        """Whenever the worker dies, start it again, with a smaller micro-batch if memory ran out."""
        while True:
            assert self._worker is not None  # noqa: S101 - launched before
            code = await self._worker.wait()
            if self.failed.done():
                return
            self._went_down(code)
            if not self._job or self._crashes > MAX_CRASHES:
                self.failed.set_exception(
                    WorkerError(f"The compute process died {self._crashes} times in a row (code {code}); see the log.")
                )
                return
            self.restarts += 1
            await asyncio.sleep(min(30.0, 2.0 ** (self._crashes - 1) - 1))
            worker = await WorkerProcess.launch(self._memory, self._on_event)
            with contextlib.suppress(WorkerError):  # it died again; the next turn sees that
                await worker.send(self._job)
                self._worker = worker  # not before the job: it must be the first thing that the worker hears
                if self._begun is not None:
                    await worker.send(self._begun)
            self._worker = worker

    def _went_down(self, code: int) -> None:
        """Forget what the dead worker had gathered, and wake who waits for it."""
        log.warning("the worker died with code %d; starting it again", code)
        self._ready.clear()
        self._samples = 0
        self._crashes += 1
        if code == -9 and not self._settings.micro_batch and self._job:
            # Nobody but the kernel's out-of-memory killer sends this uninvited.
            self._job["micro_batch"] = max(1, self.micro_batch // 2)
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
        self._on_change()


def _recall(path: Path | None) -> int:
    """The micro-batch found earlier; 0 if none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, P2PLLMError):
        if path is not None:
            return int(json.loads(path.read_text())["micro_batch"])
    return 0
