"""Download: pieces come from all who have them, and nobody who is slow, dead or a liar holds it up."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest

from p2pllm.errors import StateError
from p2pllm.rounds.download import (
    IN_FLIGHT,
    LEAST_IN_FLIGHT,
    MAX_FAILURES,
    MAX_SOURCES,
    MOST_IN_FLIGHT,
    QUICK_S,
    SLOW_S,
    Download,
    in_flight,
)
from p2pllm.testing import virtual

PIECES = range(20)
NEVER = 10**6
"""Virtual seconds: whoever waits for it fails by the clock."""


class Sources:
    """What each source does with a piece: seconds that it takes, and whether it is right, wrong or does not come."""

    def __init__(self, **takes: float) -> None:
        self.takes = takes
        self.wrong: set[str] = set()
        self.broken: set[str] = set()
        self.asked: list[tuple[str, int]] = []
        self.at_it: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.got: list[int] = []

    async def fetch(self, source: str, piece: int) -> bool | None:
        self.asked.append((source, piece))
        self.at_it[source] += 1
        self.most[source] = max(self.most[source], self.at_it[source])
        try:
            await asyncio.sleep(self.takes[source])
        finally:
            self.at_it[source] -= 1
        if source in self.wrong:
            return False
        if source in self.broken:
            return None
        self.got.append(piece)
        return True

    def counts(self) -> Counter[str]:
        return Counter(source for source, _ in self.asked)


async def download(sources: Sources, limit: float) -> tuple[bool, Download]:
    work = Download(PIECES, sources.takes, sources.fetch)
    async with asyncio.timeout(limit):
        done = await work.run()
    assert not +sources.at_it, "nobody is asked any more when it is over"
    return done, work


@virtual
async def test_all_sources_share_the_work() -> None:
    sources = Sources(a=2.0, b=2.0, c=2.0, d=2.0)
    done, work = await download(sources, 2 * len(PIECES) / (4 * in_flight(4)) + 2.1)
    assert done and not work.liars
    assert set(sources.got) == set(PIECES)
    assert all(count >= len(PIECES) // 5 for count in sources.counts().values())
    assert max(sources.most.values()) == in_flight(4)


@pytest.mark.parametrize(("seconds", "most"), [(QUICK_S - 0.1, MOST_IN_FLIGHT), (QUICK_S + 0.1, IN_FLIGHT)])
@virtual
async def test_one_source_gives_all_and_more_at_once_if_it_is_quick(seconds: float, most: int) -> None:
    sources = Sources(a=seconds)
    work = Download(range(100), ["a"], sources.fetch)
    assert await work.run()
    assert set(sources.got) == set(range(100))
    assert sources.most["a"] == most


@virtual
async def test_a_source_on_a_slow_line_is_asked_for_less_at_once() -> None:
    """The pieces that are asked for share a line on which one alone takes 2 s."""
    sources = Sources(a=0.0)
    most: dict[int, int] = {}

    async def fetch(source: str, piece: int) -> bool | None:
        sources.at_it[source] += 1
        most[piece] = sources.at_it[source]
        left = 2.0
        while left > 1e-6:
            await asyncio.sleep(0.1)
            left -= 0.1 / sources.at_it[source]
        sources.at_it[source] -= 1
        return True

    assert await Download(range(30), ["a"], fetch).run()
    assert most[IN_FLIGHT - 1] == IN_FLIGHT and max(most.values()) == IN_FLIGHT
    assert LEAST_IN_FLIGHT <= most[29] <= SLOW_S / 2


@pytest.mark.parametrize("how", ["wrong", "broken"])
@virtual
async def test_who_lies_or_fails_is_asked_no_more(how: str) -> None:
    sources = Sources(bad=0.1, good=1.0)
    getattr(sources, how).add("bad")
    done, work = await download(sources, len(PIECES))
    assert done
    assert set(sources.got) == set(PIECES)
    assert sources.counts()["bad"] <= in_flight(2) + MAX_FAILURES
    assert work.liars == ({"bad"} if how == "wrong" else set())


@virtual
async def test_a_source_may_fail_once() -> None:
    sources = Sources(a=0.1)
    failed: list[int] = []

    async def fetch(source: str, piece: int) -> bool | None:
        if not failed:
            failed.append(piece)
            return None
        return await sources.fetch(source, piece)

    assert await Download(PIECES, ["a"], fetch).run()
    assert set(sources.got) == set(PIECES)


@virtual
async def test_a_source_that_gives_nothing_holds_up_nobody() -> None:
    sources = Sources(hung=NEVER, good=1.0)
    done, _ = await download(sources, len(PIECES) / in_flight(2) + 2.0)
    assert done
    assert sources.counts()["hung"] == in_flight(2)
    assert set(sources.got) == set(PIECES)


@virtual
async def test_it_fails_when_nobody_is_left() -> None:
    sources = Sources(a=1.0, b=1.0)
    sources.wrong.add("a")
    sources.broken.add("b")
    done, work = await download(sources, 10.0)
    assert not done
    assert work.liars == {"a"}
    assert not (await download(Sources(), 1.0))[0]


@virtual
async def test_nothing_is_done_when_nothing_is_missing() -> None:
    sources = Sources(a=1.0)
    assert await Download([], ["a"], sources.fetch).run()
    assert sources.asked == []


@virtual
async def test_only_so_many_sources_are_asked() -> None:
    sources = Sources(**{f"source-{number}": 1.0 for number in range(MAX_SOURCES + 5)})
    assert (await download(sources, 10.0))[0]
    assert len(sources.counts()) == MAX_SOURCES


@virtual
async def test_who_gives_up_leaves_no_task_behind() -> None:
    sources = Sources(hung=NEVER)
    before = asyncio.all_tasks()
    with pytest.raises(TimeoutError):
        await download(sources, 5.0)
    assert not +sources.at_it
    assert asyncio.all_tasks() == before


@virtual
async def test_what_fails_here_is_no_source_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    async def fetch(source: str, piece: int) -> bool:
        await asyncio.sleep(1.0)
        raise StateError("The disk is full.")

    with pytest.raises(StateError, match="full"):
        await Download(PIECES, ["a", "b"], fetch).run()
    gc.collect()
    assert not caplog.records, "nobody looked at an error"
