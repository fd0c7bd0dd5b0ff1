"""The worker process from the daemon's side: start, commands in, events out, its end, and starting it again.

What does not live here: what commands mean (`worker`) and which of them are given when (`compute`).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from p2pllm.errors import OutOfMemoryError, WorkerError
from p2pllm_peers.priority import offer

log = logging.getLogger(__name__)

_LINE_LIMIT = 1 << 22

MAX_CRASHES = 5
"""Deaths without a finished update in between that are forgiven; the next one ends the peer."""

FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
"""Before a worker is started again: nothing after its first death, and then twice as long each time."""

CLOSE_TIMEOUT_S = 2.0
"""A worker that does not end by itself in this time is killed."""

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""For how many turns a thread of torch spins for the others before it sleeps, in GNU's OpenMP, and for how many
milliseconds in LLVM's and Intel's. OpenMP takes as many turns where it has more threads than cores. By default it spins
for milliseconds: no core ever looks free, so one that shares its core with another program is moved to none, and all
wait for it. One busy program then takes 99 % of a worker's speed."""

_KILLED = -9

Event = dict[str, Any]


class End(enum.Enum):
    """Why a worker ended."""

    ASKED = "it was asked to"
    OUT_OF_MEMORY = "the system ended it for want of memory"
    """Nobody but the out-of-memory killers of kernel and system kills a worker that we have not killed."""
    SILENT = "it did not answer and was killed"
    CRASHED = "it crashed"


class WorkerProcess:
    """A running worker; made by `launch`."""

    def __init__(self, process: asyncio.subprocess.Process, on_event: Callable[[Event], None]) -> None:
        self.killed = False
        """By us, and not by the system."""
        self._process = process
        self._on_event = on_event
        self._reading = asyncio.gather(self._read_events(), self._read_errors())

    @classmethod
    async def launch(cls, memory: int, runtime_dir: Path, on_event: Callable[[Event], None]) -> Self:
        """Start it. memory: descriptor of the shared memory, which the child gets under the same number.

        runtime_dir: of the daemon's sockets, which the worker removes when the daemon was killed.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "p2pllm_peers.worker", str(runtime_dir)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(memory,),
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,  # Linux shares the CPU out by sessions first, so only so its niceness counts
            limit=_LINE_LIMIT,
        )
        offer(process.pid)
        return cls(process, on_event)

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def send(self, *commands: Event) -> None:
        """Give it commands, nobody else's between them. Raises WorkerError if it is gone."""
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        try:
            self._process.stdin.writelines(json.dumps(command).encode() + b"\n" for command in commands)
            await self._process.stdin.drain()
        except OSError:
            raise WorkerError("The compute process is gone.") from None

    async def wait(self) -> int:
        """Its exit code, once every event that it sent has been handled."""
        await asyncio.shield(self._reading)
        return await self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        if self.alive:
            self.killed = True
            self._process.kill()

    async def _read_events(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        async for line in self._process.stdout:
            self._on_event(json.loads(line))

    async def _read_errors(self) -> None:
        """Keep what the worker and its libraries say on standard error."""
        assert self._process.stderr is not None  # noqa: S101 - it was asked for
        async for line in self._process.stderr:
            log.info("worker: %s", line.decode(errors="replace").rstrip())


class KeptWorker:
    """A worker that is started again when it dies, until it died too often."""

    def __init__(
        self,
        memory: int,
        runtime_dir: Path,
        on_event: Callable[[Event], None],
        orders: Callable[[], list[Event]],
        on_end: Callable[[End], bool],
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        """orders: what one that was started again must hear; its first is empty while there is nothing to do yet.

        on_end: called for each that ended; whether there may be another. on_failure: called when it
        died too often.
        """
        self.restarts = 0
        self._memory, self._runtime_dir = memory, runtime_dir
        self._on_event = on_event
        self._orders = orders
        self._on_end, self._on_failure = on_end, on_failure
        self._worker: WorkerProcess | None = None
        self._watching: asyncio.Task[None] | None = None
        self._crashes = 0
        self._wanted = asyncio.Event()
        self._wanted.set()

    async def launch(self) -> None:
        """Start the first one."""
        self._worker = await WorkerProcess.launch(self._memory, self._runtime_dir, self._on_event)
        self._watching = asyncio.create_task(self._watch())

    @property
    def pid(self) -> int | None:
        """Process id; None while there is none."""
        return self._worker.pid if self._worker is not None and self._worker.alive else None

    async def send(self, *commands: Event) -> None:
        """Give it commands, nobody else's between them. Raises WorkerError if it is gone."""
        if self._worker is None:
            raise WorkerError("The compute process was not started.")
        await self._worker.send(*commands)

    def kill(self) -> None:
        """End it at once; another one follows."""
        if self._worker is not None:
            self._worker.kill()

    def forgive(self) -> None:
        """It has brought something: crashes count from 0."""
        self._crashes = 0

    async def park(self) -> None:
        """End it in order; another one follows after `wake`."""
        if self._wanted.is_set():
            self._wanted.clear()
            await self._end()

    def wake(self) -> None:
        """There is to be one."""
        self._wanted.set()

    async def close(self) -> None:
        """End it for good, whatever it is doing; takes at most CLOSE_TIMEOUT_S."""
        if self._watching is not None:
            self._watching.cancel()
        await self._end()

    async def _end(self) -> None:
        if self._worker is None:
            return
        with contextlib.suppress(WorkerError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._worker.send({"do": "exit"})
                await self._worker.wait()
        self._worker.kill()
        await self._worker.wait()

    async def _watch(self) -> None:
        """Keep a worker alive; if that cannot be done, the peer must know."""
        try:
            await self._keep_alive()
        except Exception as error:
            log.exception("the worker cannot be supervised")
            self._on_failure(WorkerError(f"The compute process cannot be kept alive: {error}."))

    async def _keep_alive(self) -> None:
        while True:
            assert self._worker is not None  # noqa: S101 - launched before
            code = await self._worker.wait()
            end = self._why(code)
            if not self._on_end(end):
                return None
            if end is not End.ASKED:
                log.warning("the worker ended with code %d: %s; starting it again", code, end.value)
                self._crashes += 1
                if not self._orders()[0] or self._crashes > MAX_CRASHES:
                    return self._on_failure(_failure(end, code, self._crashes))
                self.restarts += 1
                await asyncio.sleep(min(LAST_PAUSE_S, FIRST_PAUSE_S * (2.0 ** (self._crashes - 1) - 1)))
            await self._wanted.wait()
            worker = await WorkerProcess.launch(self._memory, self._runtime_dir, self._on_event)
            try:
                with contextlib.suppress(WorkerError):  # it died again; the next turn sees that
                    await worker.send(self._orders()[0])
            except asyncio.CancelledError:
                worker.kill()  # nobody else knows of it
                raise
            self._worker = worker  # not before the job: it must be the first thing that the worker hears
            with contextlib.suppress(WorkerError):
                await worker.send(*self._orders()[1:])  # as they are now: more was wanted while it took its job

    def _why(self, code: int) -> End:
        assert self._worker is not None  # noqa: S101 - it has just ended
        if not self._wanted.is_set():
            return End.ASKED
        if self._worker.killed:
            return End.SILENT
        return End.OUT_OF_MEMORY if code == _KILLED else End.CRASHED


def _failure(end: End, code: int, times: int) -> WorkerError:
    """What a peer whose worker died so often in a row tells its user."""
    match end:
        case End.OUT_OF_MEMORY:
            return OutOfMemoryError(
                f"The system ended the compute process {times} times in a row for want of memory; close other "
                "programs, or choose another --device or a run with a smaller model."
            )
        case End.SILENT:
            return WorkerError(f"The compute process did not answer {times} times in a row; see the log.")
    return WorkerError(f"The compute process died {times} times in a row (code {code}); see the log.")
