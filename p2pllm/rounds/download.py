"""Downloading many pieces from several peers at once: each is checked before it is used.

A source that breaks off, lies, or lets a piece wait for long is replaced by the others; a piece that one of them is
slow with is asked of another one as well. What does not live here: what the pieces are (`fetching`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

IN_FLIGHT = 8
"""Pieces that all sources together are asked for at first: each is a stream of its own, of which a long line needs
several."""

MOST_IN_FLIGHT = 16
"""The same where they come quickly; `network.bulk` serves one peer no more."""

LEAST_IN_FLIGHT = 2
"""Of one source: one travels while the next is read from its disk."""

QUICK_S, SLOW_S = 1.5, 6.0
"""A piece that came within so many seconds did not fill the line: its source is asked for one more at once. One that
took so many shared it with too many others: its source is asked for one less."""

MAX_SOURCES = 8

MAX_FAILURES = 2
"""Pieces that a source may fail to give before it is asked for no more; one that is wrong is enough."""

Fetch = Callable[[str, int], Awaitable[bool | None]]
"""(source, piece) -> True: it is here; False: it was wrong; None: it did not come."""


def in_flight(sources: int) -> int:
    """Pieces that each of so many sources is asked for at first."""
    return max(LEAST_IN_FLIGHT, IN_FLIGHT // max(1, sources))


class Download:
    """One download of some pieces. `liars` are the sources that gave a wrong piece."""

    def __init__(self, pieces: Iterable[int], sources: Iterable[str], fetch: Fetch) -> None:
        self.liars: set[str] = set()
        self._missing = dict.fromkeys(pieces)  # in order
        self._asked: dict[int, set[str]] = {piece: set() for piece in self._missing}  # the sources that are at it
        self._failures: Counter[str] = Counter()
        self._busy: Counter[str] = Counter()  # pieces that each source is at
        self._sources = list(sources)[:MAX_SOURCES]
        self._fetch = fetch
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> bool:
        """Fetch all; False if no source is left that could give what is missing. Raises what `fetch` raises."""
        each = in_flight(len(self._sources))
        self._tasks = {asyncio.create_task(self._work(source)) for source in self._sources for _ in range(each)}
        try:
            while self._missing and self._tasks:
                done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                self._tasks -= done
                await asyncio.gather(*done)
            return not self._missing
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, source: str) -> None:
        """Fetch from one source as long as it is good for anything."""
        while self._missing and source not in self.liars and self._failures[source] < MAX_FAILURES:
            piece = self._next(source)
            if piece is None:
                return  # the others of us are at what is left
            self._asked[piece].add(source)
            self._busy[source] += 1
            begun = asyncio.get_running_loop().time()
            try:
                came = await self._fetch(source, piece)
            finally:
                self._asked[piece].discard(source)
                self._busy[source] -= 1
            if came:
                self._missing.pop(piece, None)
                took = asyncio.get_running_loop().time() - begun
                if took < QUICK_S and self._missing and len(self._tasks) < MOST_IN_FLIGHT:
                    self._tasks.add(asyncio.create_task(self._work(source)))
                if took > SLOW_S and self._busy[source] >= LEAST_IN_FLIGHT:
                    return  # as many others of us are at it
            elif came is None:
                self._failures[source] += 1
            else:
                self.liars.add(source)

    def _next(self, source: str) -> int | None:
        """What nobody is at goes first; then what others are slow with, so that one cannot hold up the end."""
        if (piece := next((piece for piece in self._missing if not self._asked[piece]), None)) is not None:
            return piece
        others = [piece for piece in self._missing if source not in self._asked[piece]]
        return min(others, key=lambda missing: len(self._asked[missing]), default=None)
