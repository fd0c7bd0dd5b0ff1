"""Room: memory for a mean that one exchange after the other uses, instead of new memory for each.

New memory has to be cleared by the system, and on a virtual machine that gives free memory back to its host, first to
be had again: a third of the processor time of an all-reduce, measured on one. What does not live here: who reads a
mean, and for how long; it is theirs as long as they hold it.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from contextlib import suppress

import numpy as np

from p2pllm.averaging.codecs import Floats


class Room:
    """Gives out vectors. While nobody holds the last one, the system may take its memory if it is short of any.

    Until it does, the memory counts as this process's own.
    """

    def __init__(self) -> None:
        self._area: mmap.mmap | None = None

    def take(self, size: int) -> Floats:
        """A vector, float32 (size,), of any content, that shares no memory with one that anybody still holds."""
        if size == 0 or sys.platform == "win32":
            return np.empty(size, np.float32)
        size_bytes = size * np.float32().itemsize
        area, self._area = self._area, None
        if area is None or len(area) < size_bytes:  # the fragments of a model differ a little
            area = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _advise(area, "MADV_HUGEPAGE")  # as numpy does for its own: 2 MB a page fault instead of 4 kB
        vector: Floats = np.frombuffer(area, np.float32, size)
        # Every view of the vector refers to it, at whatever remove: it goes when the last of them does.
        weakref.finalize(vector, self._take_back, area).atexit = False
        return vector

    def _take_back(self, area: mmap.mmap) -> None:
        _advise(area, "MADV_FREE")
        self._area = area  # only now: another thread may take it at once


def _advise(area: mmap.mmap, name: str) -> None:
    """Tell the system what it may do, where it knows of that; nothing else depends on it."""
    advice = getattr(mmap, name, None)
    if advice is not None:
        with suppress(OSError):
            area.madvise(advice)
