"""ComputeProcess: the worker as the daemon sees it: started, fed, watched, and started again when it dies.

The worker itself is `worker`. Its protocol is described there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import mmap
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from p2pllm.errors import DataError, ManifestError, P2PLLMError, SettingsError, StateError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.rounds.round import Update
from p2pllm.settings import PeerSettings
from p2pllm.state.layout import Layout

log = logging.getLogger(__name__)

MAX_CRASHES = 5
"""Deaths without a finished update in between after which the worker is given up."""

ANSWER_TIMEOUT_S = 120.0
"""A worker that does not answer a command in this time is killed and started again."""

SPEED_WINDOW_S = 30.0
"""Tokens a second are measured over this long."""

_LINE_LIMIT = 1 << 22
_ERRORS = {kind.__name__: kind for kind in (ManifestError, DataError, SettingsError, StateError, WorkerError)}


class ComputeProcess:
    """Starts and supervises one worker; implements `p2pllm.rounds.loop.Compute`."""

    def __init__(
        self,
        settings: PeerSettings,
        runtime_dir: Path,
        on_change: Callable[[], None],
        on_progress: Callable[[str], None],
    ) -> None:
        self.restarts = 0
        self.device = self.data_digest = ""
        self.micro_batch = 0
        self.own_steps: list[int] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._runtime_dir = runtime_dir
        self._on_change = on_change
        self._on_progress = on_progress
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._job: dict[str, Any] = {}
        self._memory = _shared_file()
        self._ready = asyncio.Event()
        self._answer: asyncio.Future[dict[str, Any] | None] | None = None
        self._begun: dict[str, Any] | None = None
        self._samples = 0
        self._crashes = 0
        self._closing = False
        self._computed: deque[tuple[float, int]] = deque()
        self._remembered: Path | None = None
        self.run_id = self.peer_id = ""

    # -- life ---------------------------------------------------------------------------------------------------

    async def launch(self) -> None:
        """Start the process; it loads its libraries while the daemon finds out what to compute."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "p2pllm_peers.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(self._memory,),
            limit=_LINE_LIMIT,
        )
        self._tasks = [
            asyncio.create_task(task(self._process)) for task in (self._listen, self._log_errors, self._watch)
        ]

    async def build(self, draft: RunDraft, tokenizer: bytes | None, remembered: Path | None, timeout: float) -> Layout:
        """Hand over the job and wait until model and data are ready.

        remembered: file that keeps the micro-batch for the next start. Afterwards `params` holds the initial
        parameters. Raises what the worker raised, or WorkerError if it dies or is not ready in `timeout`
        seconds.
        """
        self._remembered = remembered
        self._job = {
            "draft": json.loads(
                RunDraft.model_validate(draft.model_dump(include=set(RunDraft.model_fields))).canonical_bytes()
            ),
            "tokenizer": base64.b64encode(tokenizer).decode() if tokenizer is not None else "",
            "settings": json.loads(self._settings.model_dump_json()),
            "shared_fd": self._memory,
            "runtime_dir": str(self._runtime_dir),
            "fresh": True,
            "micro_batch": self._settings.micro_batch or _recall(remembered),
        }
        await self._send(self._job)
        waiting = asyncio.ensure_future(self._ready.wait())
        await asyncio.wait([waiting, self.failed], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.failed.done():
            self.failed.result()
        if not self.ready:
            raise WorkerError(f"The compute process was not ready after {timeout:.0f} s; raise startup_timeout_s.")
        size = os.fstat(self._memory).st_size // 8
        both = np.frombuffer(mmap.mmap(self._memory, 8 * size), dtype="<f4")
        self.params, self._update = both[:size], both[size:]
        self._job["fresh"] = False  # a restarted worker must not overwrite what the run has trained
        return self.layout

    async def close(self) -> None:
        """End the process and give its memory back; within 3 seconds, whatever it is doing."""
        self._closing = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(WorkerError):
                await self._send({"do": "exit"})
            try:
                async with asyncio.timeout(2):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        for task in self._tasks:
            task.cancel()
        os.close(self._memory)
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()  # seen; the owner may be leaving for another reason

    @property
    def pid(self) -> int | None:
        """Process id of the living worker."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process and alive else None

    # -- what the loop uses -------------------------------------------------------------------------------------

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
        now = time.monotonic()
        while self._computed and self._computed[0][0] < now - SPEED_WINDOW_S:
            self._computed.popleft()
        if len(self._computed) < 2:
            return 0.0
        span = now - self._computed[0][0]
        return sum(tokens for _, tokens in list(self._computed)[1:]) / span if span > 0 else 0.0

    async def begin(self, round_number: int) -> None:
        """Gather gradients of the parameters as they are now."""
        self._samples = 0
        self._begun = {"do": "begin", "round": round_number, "run_id": self.run_id, "peer": self.peer_id}
        if self.ready:
            with contextlib.suppress(WorkerError):  # it died; `_watch` begins again when it is back
                await self._send(self._begun)

    async def finish(self) -> Update | None:
        """The update of this round; None if nothing was gathered or the worker died."""
        answer = await self._ask({"do": "finish"})
        self._begun = None
        if answer is None or answer["samples"] < 1 or not np.isfinite(answer["loss"]):
            return None
        self._crashes = 0
        self.own_steps = answer["steps"]
        return Update(answer["samples"], answer["loss"], self._update)

    async def abandon(self) -> None:
        """Drop what was gathered; the worker no longer reads the parameters afterwards."""
        self._begun = None
        await self._ask({"do": "abandon"})

    async def evaluate(self) -> float | None:
        """Validation loss of the parameters as they are now, nats a token; None if the worker died."""
        answer = await self._ask({"do": "evaluate"})
        return None if answer is None else float(answer["loss"])

    # -- the pipe -----------------------------------------------------------------------------------------------

    async def _send(self, command: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise WorkerError("The compute process was not started.")
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            await self._process.stdin.drain()
        except OSError:
            raise WorkerError("The compute process is gone.") from None

    async def _ask(self, command: dict[str, Any]) -> dict[str, Any] | None:
        """Send a command and wait for its answer; None if the worker dies over it or is not up."""
        if not self.ready:
            return None
        answer = self._answer = asyncio.get_running_loop().create_future()
        try:
            await self._send(command)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                result: dict[str, Any] | None = await answer
                return result
        except WorkerError:
            return None
        except TimeoutError:
            log.error("the worker does not answer; killing it")
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
            return None
        finally:
            self._answer = None

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Take the worker's events."""
        assert process.stdout is not None  # noqa: S101 - it was asked for
        async for line in process.stdout:
            event = json.loads(line)
            match event["event"]:
                case "progress":
                    self._on_progress(event["text"])
                case "ready":
                    self.layout = Layout.from_json(event["layout"])
                    self.device, self.micro_batch = event["device"], event["micro_batch"]
                    self.data_digest = event["data_digest"]
                    _remember(self._remembered, self.micro_batch)
                    self._ready.set()
                    self._on_change()
                case "step":
                    self._samples = event["samples"]
                    self._computed.append((time.monotonic(), event["tokens"]))
                    self._on_change()
                case "micro_batch":
                    self.micro_batch = event["micro_batch"]
                    _remember(self._remembered, self.micro_batch)
                case "error":
                    if not self.failed.done():
                        self.failed.set_exception(_ERRORS.get(event["kind"], WorkerError)(event["message"]))
                case _:
                    if self._answer is not None and not self._answer.done():
                        self._answer.set_result(event)

    async def _log_errors(self, process: asyncio.subprocess.Process) -> None:
        """Keep what the worker and its libraries say on standard error."""
        assert process.stderr is not None  # noqa: S101 - it was asked for
        async for line in process.stderr:
            log.info("worker: %s", line.decode(errors="replace").rstrip())

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """When the worker dies, start it again, with a smaller micro-batch if memory ran out."""
        code = await process.wait()
        if self._closing or self.failed.done():
            return
        was_ready = self.ready
        self._ready.clear()
        self._samples = 0
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
        self._on_change()
        self._crashes += 1
        if (not was_ready and not self._job) or self._crashes > MAX_CRASHES:
            self.failed.set_exception(
                WorkerError(
                    f"The compute process died {self._crashes} times in a row, last with code {code}; see the log."
                )
            )
            return
        self.restarts += 1
        if code == -9 and not self._settings.micro_batch:
            # Nobody but the kernel's out-of-memory killer sends this uninvited.
            self._job["micro_batch"] = max(1, self.micro_batch // 2)
        log.warning("the worker died with code %d; starting it again", code)
        await asyncio.sleep(min(30.0, 2.0 ** (self._crashes - 1) - 1))
        self._tasks = []
        await self.launch()
        with contextlib.suppress(WorkerError):
            await self._send(self._job)
        self._tasks.append(asyncio.create_task(self._resume()))

    async def _resume(self) -> None:
        """Once the new worker is ready, begin the round that the old one was in."""
        await self._ready.wait()
        if self._begun is not None:
            with contextlib.suppress(WorkerError):
                await self._send(self._begun)


def _shared_file() -> int:
    """A file that has no name, so that nothing is left of it however the processes end."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("p2pllm")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _recall(path: Path | None) -> int:
    """The micro-batch found earlier; 0 if none."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, P2PLLMError):
        if path is not None:
            return int(json.loads(path.read_text())["micro_batch"])
    return 0


def _remember(path: Path | None, micro_batch: int) -> None:
    if path is not None:
        with contextlib.suppress(OSError):  # only a hint for the next start
            path.write_text(json.dumps({"micro_batch": micro_batch}))
