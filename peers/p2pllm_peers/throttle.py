"""Throttle: keeps what a peer takes of the processor at what the machine's user allows.

The worker rests after each step (`rest`); how long follows from what all processes of the peer really took, so that
heartbeats, encryption and the ends of rounds count, too. What does not live here: when a peer may compute at all
(`guest`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import psutil

from p2pllm_peers.cores import usable_cores

Tell = Callable[[float, float | None], Awaitable[None]]

MEASURE_S = 2.0
"""How often the processor time is read."""

LEAST = 0.01
"""Of what is allowed the worker may take this much at least, so that where heartbeats take all of it a rest ends."""

_MEMORY_S = 20.0
"""What was taken too little is made up for within about this time."""

_DEBT_S = 300.0
"""What was taken too much is made up for, too: of a step that took what is allowed in this time, all of it."""


class Feedback:
    """From what was taken to the cores that the worker may take on average, by `rest`."""

    def __init__(self, allowed: float) -> None:
        """allowed: cores, all in all."""
        self._owed_s = 0.0  # core seconds that may still be taken, or if negative were taken too much
        self.cores = allowed

    def update(self, allowed: float, worker_s: float, others_s: float, wall_s: float) -> float:
        """The cores for the next while. allowed: cores. worker_s, others_s: core seconds taken in the last `wall_s`."""
        self._owed_s += allowed * wall_s - worker_s - others_s
        # a pause, or a wait for others, is no credit for an hour of full speed
        self._owed_s = min(max(self._owed_s, -allowed * _DEBT_S), allowed * _MEMORY_S)
        self.cores = max(LEAST * allowed, allowed + self._owed_s / _MEMORY_S - others_s / wall_s)
        return self.cores


class Throttle:
    """Measures this peer's processes and tells the worker how much it may take."""

    def __init__(self, workers: Callable[[], frozenset[int]], tell: Tell) -> None:
        """workers: process ids of the workers. tell: hands them a share of the time, and cores, None for all."""
        self._workers = workers
        self._tell = tell
        self._feedback: Feedback | None = None  # there is no limit
        self._duty = 1.0
        self.cpu_percent = 100.0
        """Of all cores that this process may use."""
        self.duty_percent = 100.0
        """Of the time, whatever the worker computes on."""

    async def run(self) -> None:
        """Measure and tell, for good."""
        at, taken = time.monotonic(), (0.0, 0.0)
        while True:
            if self.cpu_percent < 100:
                before, before_at = taken, at
                with contextlib.suppress(psutil.Error, OSError):  # no descriptor is left, say; the next look counts it
                    at, taken = time.monotonic(), self._taken()
                    worker_s, others_s = (max(0.0, now - then) for now, then in zip(taken, before, strict=True))
                    await self._hold(worker_s, others_s, at - before_at)
            elif self._feedback is not None or self.duty_percent / 100 != self._duty:
                self._feedback = None
                await self._tell_limits(None)
            await asyncio.sleep(MEASURE_S)  # the span over which it is measured

    async def _hold(self, worker_s: float, others_s: float, wall_s: float) -> None:
        allowed = self.cpu_percent / 100 * usable_cores()
        if self._feedback is None:  # what was taken before there was a limit does not count
            self._feedback = Feedback(allowed)
        else:
            self._feedback.update(allowed, worker_s, others_s, wall_s)
        await self._tell_limits(self._feedback.cores)

    async def _tell_limits(self, cores: float | None) -> None:
        self._duty = self.duty_percent / 100
        await self._tell(self._duty, cores)

    def _taken(self) -> tuple[float, float]:
        """Core seconds of the workers, and of the daemon and p2pd, since they began."""
        worker, others = 0.0, 0.0
        own, workers = psutil.Process(), self._workers()
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                if process.pid in workers:
                    worker += times.user + times.system
                else:
                    others += times.user + times.system
        return worker, others
