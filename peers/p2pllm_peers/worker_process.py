"""One life of a worker process, from the daemon's side: start, commands in, events out, exit code.

What does not live here: what commands mean (`worker`), and starting it again when it dies (`compute`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Self

from p2pllm.errors import WorkerError

log = logging.getLogger(__name__)

_LINE_LIMIT = 1 << 22

Event = dict[str, Any]


class WorkerProcess:
    """A running worker; made by `launch`."""

    def __init__(self, process: asyncio.subprocess.Process, on_event: Callable[[Event], None]) -> None:
        self._process = process
        self._on_event = on_event
        self._reading = asyncio.gather(self._read_events(), self._read_errors())

    @classmethod
    async def launch(cls, memory: int, on_event: Callable[[Event], None]) -> Self:
        """Start it. memory: descriptor of the shared memory, which the child gets under the same number."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "p2pllm_peers.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(memory,),
            start_new_session=True,  # Linux shares the CPU out by sessions first, so only so its niceness counts
            limit=_LINE_LIMIT,
        )
        return cls(process, on_event)

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def send(self, command: Event) -> None:
        """Give it a command. Raises WorkerError if it is gone."""
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
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


def shared_file() -> int:
    """Descriptor of a file that has no name, so that nothing is left of it however the processes end."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("p2pllm")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
