"""Downloading many pieces from several peers at once: each is checked before it is used.

A source that breaks off, lies, or lets a piece wait for long is replaced by the others; a piece that one of them is
slow with is asked of another one as well. What does not live here: what the pieces are (`fetching`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

IN_FLIGHT = 8
"""Pieces that all sources together are asked for at once: each is a stream of its own, of which a long line needs
several. More would share a slow line until one seems to stall."""

LEAST_IN_FLIGHT = 2
"""Of one source: one travels while the next is read from its disk."""

MAX_SOURCES = 8

MAX_FAILURES = 2
"""Pieces that a source may fail to give before it is asked for no more; one that is wrong is enough."""

Fetch = Callable[[str, int], Awaitable[bool | None]]
"""(source, piece) -> True: it is here; False: it was wrong; None: it did not come."""


def in_flight(sources: int) -> int:
    """Pieces that each of so many sources is asked for at once."""
    return max(LEAST_IN_FLIGHT, IN_FLIGHT // max(1, sources))


class Download:
    """One download of some pieces. `liars` are the sources that gave a wrong piece."""

    def __init__(self, pieces: Iterable[int], sources: Iterable[str], fetch: Fetch) -> None:
        self.liars: set[str] = set()
        self._missing = dict.fromkeys(pieces)  # in order
        self._asked: dict[int, set[str]] = {piece: set() for piece in self._missing}  # the sources that are at it
        self._failures: Counter[str] = Counter()
        self._sources = list(sources)[:MAX_SOURCES]
        self._fetch = fetch

    async def run(self) -> bool:
        """Fetch all; False if no source is left that could give what is missing."""
        each = in_flight(len(self._sources))
        tasks = [asyncio.create_task(self._work(source)) for source in self._sources for _ in range(each)]
        try:
            while self._missing and not all(task.done() for task in tasks):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                tasks = [task for task in tasks if not task.done()] or tasks
            return not self._missing
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, source: str) -> None:
        """Fetch from one source as long as it is good for anything."""
        while self._missing and source not in self.liars and self._failures[source] < MAX_FAILURES:
            others = [piece for piece in self._missing if source not in self._asked[piece]]
            if not others:
                return  # the others of us are at what is left
            # What nobody is at goes first; then what others are slow with, so that one cannot hold up the end.
            piece = min(others, key=lambda missing: len(self._asked[missing]))
            self._asked[piece].add(source)
            try:
                came = await self._fetch(source, piece)
            finally:
                self._asked[piece].discard(source)
            if came:
                self._missing.pop(piece, None)
            elif came is None:
                self._failures[source] += 1
            else:
                self.liars.add(source)
