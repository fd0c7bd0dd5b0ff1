"""Crew: how many threads compute on a processor, by how many of its cores other programs leave.

Threads wait for each other many times a step, so one that has to share its core with another program makes all of them
as slow. What does not live here: how long they wait awake (`worker_process.ENVIRONMENT`), and what a peer may take
where nobody else wants it (`throttle`, `rest`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import psutil

from p2pllm_peers.cores import cores_here, usable_cores

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
        usable: Callable[[], float] = usable_cores,
    ) -> None:
        """own: core seconds that this process has taken. all_of_them: of the cores that it may run on.

        usable: cores that a quota leaves of them.
        """
        self.workers = 1
        """Of this peer on these cores, this one included; each takes the same part of what others leave."""
        self._clock, self._own, self._all, self._usable = clock, own, all_of_them or taken, usable
        self._at, self._own_s, self._all_s = clock(), own(), self._all()[0]
        self._left = math.inf  # cores that others left in the time before

    def due(self) -> bool:
        """The last look was long enough ago."""
        return self._clock() - self._at >= MEASURE_S

    def size(self, most: int) -> int:
        """Threads for the next while, 1 to `most`: as many as there are cores that others left free on average."""
        wall_s = self._clock() - self._at
        if wall_s >= _LEAST_S:
            self._left = self._free(wall_s)
        return max(1, min(most, round(min(self._left, self._usable()) / self.workers)))

    def _free(self, wall_s: float) -> float:
        """Cores that others left since the last look; our kin take what we take."""
        own, (everybody, cores) = self._own(), self._all()
        others_s = everybody - self._all_s - self.workers * (own - self._own_s)
        self._at, self._own_s, self._all_s = self._at + wall_s, own, everybody
        return cores - max(0.0, others_s) / wall_s


def taken() -> Reading:
    """Of the cores that this process may run on; no seconds where the system does not tell, as if we were alone.

    Time that a host withholds from a virtual machine counts as free.
    """
    here = cores_here()
    try:
        each = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in here]
    except (psutil.Error, OSError):
        each = []
    if len(each) < len(here):  # a container may hide them, or give them other numbers
        return 0.0, len(here)
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are in user and nice, too
    busy = sum(seconds for times in each for name, seconds in times._asdict().items() if name not in idle)
    return busy, len(here)
