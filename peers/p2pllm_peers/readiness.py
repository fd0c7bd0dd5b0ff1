"""Readiness: whether a worker has built what it computes with, will yet, or never will.

What does not live here: starting it again when it dies (`worker_process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from p2pllm.errors import P2PLLMError, WorkerError


class Readiness:
    """Of one worker, over its deaths."""

    def __init__(self) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Raises what ended the worker for good."""
        self.heard_at = time.monotonic()
        """When it was heard of last."""
        self._ready = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """It is up and has a model."""
        return self._ready.is_set()

    def set(self, ready: bool) -> None:
        """It is, or it went down."""
        if ready:
            self._ready.set()
        else:
            self._ready.clear()

    def fail(self, error: P2PLLMError) -> None:
        """It never will be; the first reason counts."""
        if not self.failed.done():
            self.failed.set_exception(error)

    def heard(self) -> None:
        """It shows a sign of life."""
        self.heard_at = time.monotonic()

    async def wait(self) -> None:
        """Until it is ready. Raises what ended it for good."""
        waiting: asyncio.Future[Any] = asyncio.ensure_future(self._ready.wait())
        either: list[asyncio.Future[Any]] = [waiting, self.failed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self.failed.done():
            self.failed.result()

    async def within(self, timeout: float) -> None:
        """The same, and raise WorkerError if nothing is heard of it for `timeout` seconds."""
        while not self.is_ready:
            left = self.heard_at + timeout - time.monotonic()
            if left <= 0:
                raise WorkerError(
                    f"The compute process shows no progress for {timeout:.0f} s; raise startup_timeout_s."
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.wait()

    async def fail_unless(self, timeout: float) -> None:
        """Let what `within` raises be what ended it for good."""
        try:
            await self.within(timeout)
        except P2PLLMError as error:
            self.fail(error)

    def seen(self) -> None:
        """Its failure, if there is one, need not be told again: the owner may be leaving for another reason."""
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()
