"""Crew: how many threads compute on a processor, by how many of its cores other programs leave.

Threads wait for each other many times a step, so one that has to share its core with another program makes all of them
as slow. What does not live here: how long they wait awake (`worker_process.ENVIRONMENT`), and what a peer may take
where nobody else wants it (`throttle`, `rest`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

MEASURE_S = 10.0
"""How often others are looked at."""

_LEAST_S = 1.0
"""A shorter time says nothing about them."""

Reading = tuple[float, int]
"""Core seconds that all programs together have taken, and the number of cores."""


class Crew:
    """Looks at what others took since the last look; one for a process."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        own: Callable[[], float] = time.process_time,
        all_of_them: Callable[[], Reading] | None = None,
    ) -> None:
        """own: core seconds that this process has taken. all_of_them: of the cores that it may run on."""
        self._clock, self._own, self._all = clock, own, all_of_them or taken
        self._at, self._others_s = clock(), self._look()[0]

    def due(self) -> bool:
        """The last look was long enough ago."""
        return self._clock() - self._at >= MEASURE_S

    def size(self, most: int) -> int:
        """Threads for the next while, 1 to `most`: as many as there are cores that others left free on average."""
        wall_s = self._clock() - self._at
        if wall_s < _LEAST_S:
            return most
        before = self._others_s
        self._others_s, cores = self._look()
        self._at += wall_s
        return max(1, min(most, round(cores - (self._others_s - before) / wall_s)))

    def _look(self) -> Reading:
        seconds, cores = self._all()
        return seconds - self._own(), cores


def taken() -> Reading:
    """Of the cores that this process may run on; no seconds where the system does not tell, as if we were alone.

    Time that a host withholds from a virtual machine counts as free.
    """
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        each = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in here]
    except (psutil.Error, OSError):
        each = []
    if len(each) < len(here):  # a container may hide them, or give them other numbers
        return 0.0, len(here)
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are in user and nice, too
    busy = sum(seconds for times in each for name, seconds in times._asdict().items() if name not in idle)
    return busy, len(here)
