"""MicroBatch: how many samples a worker computes at once, over its deaths and its starts.

The worker measures what suits its device, unless the user has chosen. Where memory runs out it is halved, and after
AGAIN_S, in this session or a later one, what was wanted is tried again: other programs may have ended meanwhile. What
does not live here: measuring it (`p2pllm.training.inner`) and the worker itself (`compute`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

AGAIN_S = 3600.0
"""So long after memory ran out a larger micro-batch is tried again."""

_BY_SYSTEM = "The system ended the compute process for want of memory"
_BY_TORCH = "The device had no memory left"


class Kept(NamedTuple):
    """What the next start knows. size: samples, 0: none. until: Unix time, 0: for good."""

    size: int = 0
    until: float = 0.0


class MicroBatch:
    """Of one worker."""

    def __init__(self, chosen: int, clock: Callable[[], float] = time.time) -> None:
        """chosen: by the user, in samples; 0: it is to be measured. clock: Unix time."""
        self.size = 0
        """Samples; 0: not known yet."""
        self.notice = ""
        """A sentence for the user while it is smaller than wanted for want of memory, else empty."""
        self._chosen, self._clock = chosen, clock
        self._trying = 0  # the worker measures this one now
        self._again_at = 0.0  # Unix time; 0: it is as wanted

    def start(self, kept: Kept) -> int:
        """With how many the first worker is to begin; 0: it is to measure. kept: by an earlier session."""
        holds = not self._chosen and (not kept.until or self._clock() < kept.until)
        self._again_at = kept.until if holds else 0.0
        self.size = self._chosen or (kept.size if holds else 0)
        if self._again_at:
            self.notice = (
                f"Memory ran out lately, so it computes with a micro-batch of {self.size} for a while; see `p2pllm "
                "explain memory`."
            )
        return self.size

    @property
    def kept(self) -> Kept:
        """For the next start; nothing of what the user chose, as the settings say it."""
        return Kept() if self._chosen else Kept(self.size, self._again_at)

    def trying(self, size: int) -> None:
        """The worker is about to measure with so many."""
        self._trying = size

    def found(self, size: int) -> None:
        """The worker has measured, or taken what it was told."""
        self.size, self._trying = size, 0

    def again(self, size: int) -> None:
        """What was wanted was tried again, and so many are what suits now."""
        self.found(size)
        self.notice, self._again_at = "", 0.0

    def shrunk(self, size: int) -> None:
        """The worker halved it, as its device had no memory left."""
        self._less(_BY_TORCH, size)

    def killed(self) -> bool:
        """The system ended the worker for want of memory; whether a smaller one is left to try."""
        was = self._trying or self.size
        self._less(_BY_SYSTEM, was // 2)
        return was > 1

    def due(self) -> dict[str, object] | None:
        """The order to try again what was wanted, once it is time for that."""
        if not self._again_at or self._clock() < self._again_at:
            return None
        self._again_at = self._clock() + AGAIN_S  # if it fails
        return {"do": "fit", "micro_batch": self._chosen}

    def _less(self, why: str, size: int) -> None:
        """Go on with so many; 0: that is still to be measured, or there was but one."""
        was = self._trying or self.size
        self._again_at, self._trying = self._clock() + AGAIN_S, 0
        now = "it is started again"
        if was:
            self.size = max(1, size)
            now = f"it goes on with a micro-batch of {self.size} instead of {was}"
            if self.size == was:
                now = f"it goes on with a micro-batch of {was}, the smallest there is"
        self.notice = f"{why}, so {now}; see `p2pllm explain memory`."
