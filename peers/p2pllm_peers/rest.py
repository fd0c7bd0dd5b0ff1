"""Rest: how long a worker computes nothing after a step, so that it takes no more than it may.

What does not live here: how much that is (`throttle`), and the steps (`worker`).
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Rest:
    """After each step as long as that step and what it cost ask for; what may be taken can change meanwhile."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        """cpu_clock: core seconds that this process has taken."""
        self.share = 1.0
        """Of the time in which the worker may compute."""
        self.cores: float | None = None
        """That it may take on average; None: all."""
        self._clock, self._cpu_clock = clock, cpu_clock
        self._began, self._took = clock(), 0.0
        self._cpu_at, self._cpu_s = cpu_clock(), 0.0

    def stepped(self, began: float) -> None:
        """A step that began then, by the clock, has just ended."""
        self._began, self._took = began, self._clock() - began
        cpu_at = self._cpu_clock()
        self._cpu_at, self._cpu_s = cpu_at, cpu_at - self._cpu_at  # with what was done between the steps

    def left(self) -> float:
        """Seconds until the next step may begin; 0: it may."""
        whole = max(self._took / self.share, self._cpu_s / self.cores if self.cores else 0.0)
        return max(0.0, self._began + whole - self._clock())
