"""Serving: what a peer gives to those who catch up. All of it comes from the disk and is named by digests.

A request is {"what": ...} and more:

    log        heads: [[round, digest], ...]    the records after the latest of them that is ours; our checkpoints
    record     round, digest                    one record of our log
    snapshots                                   [round, record, state] of each snapshot of our log
    plan       state                            the digests of a snapshot's chunks
    chunk      state, index                     one chunk
    aggregate  digest                           the weighted mean of a round
    proposal   digest                           the body of a round that is being voted on (answered by `keeper`)

What does not live here: moving the bytes (`network.bulk`), asking for them (`fetching`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from p2pllm.network.bulk import Blob
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.record import pack_all
from p2pllm.state import Snapshot

PAGE_BYTES = 1 << 20
"""Records that are sent at once."""

MAX_PAGE_RECORDS = PAGE_BYTES // 256
"""More of them do not fit a page: the smallest record has 350 bytes."""

MAX_ITEMS = 64
"""Heads, checkpoints and snapshots that are looked at in one message."""


GIVE_WAY_S = 5.0
"""Longest that a joiner waits for one piece because a round is exchanging."""


async def _at_once() -> None:
    """Nothing goes before it."""


class Serving:
    """Answers of one peer."""

    def __init__(self, disk: Disk) -> None:
        self.give_way: Callable[[], Awaitable[None]] = _at_once
        """Awaited before anything large is served, so that our own round goes first."""
        self._disk = disk

    async def answer(self, request: dict[str, Any]) -> Blob | None:
        """What is asked for; None if we do not have it."""
        match request.get("what"):
            case "log":
                return await asyncio.to_thread(self._log, request.get("heads"))
            case "record":
                return await asyncio.to_thread(self._record, request.get("round"), request.get("digest"))
            case "snapshots":
                found = await asyncio.to_thread(self._snapshots)
                return Blob({"snapshots": [[each.round, each.record, each.state] for each in found]})
            case "plan":
                await self.give_way()
                return await asyncio.to_thread(self._plan, request.get("state"))
            case "chunk":
                await self.give_way()
                return await asyncio.to_thread(self._chunk, request.get("state"), request.get("index"))
            case "aggregate":
                return await asyncio.to_thread(self._aggregate, request.get("digest"))
        return None

    def _log(self, heads: Any) -> Blob | None:
        if not isinstance(heads, (list, tuple)):
            return None
        known = [(head[0], head[1]) for head in heads[:MAX_ITEMS] if _is_head(head)]
        log = self._disk.log
        base = log.common(known)
        checkpoints = [point.pack() for point in log.checkpoints[-MAX_ITEMS:]]
        return Blob({"base": list(base), "checkpoints": checkpoints}, [pack_all(log.packed_after(base, PAGE_BYTES))])

    def _record(self, round_: Any, digest: Any) -> Blob | None:
        if type(round_) is not int or not self._disk.log.has((round_, digest)):
            return None
        record = self._disk.log.record(round_)
        return None if record is None else Blob({}, [record.pack()])

    def _snapshots(self) -> list[Snapshot]:
        """Ours, newest first. Round 0 is only for those who begin the run with us."""
        found = self._disk.on_branch()[:MAX_ITEMS]
        return [each for each in found if each.round > 0 or self._disk.log.branch.head[0] == 0]

    def _find(self, state: Any) -> Snapshot | None:
        return next((each for each in self._snapshots() if each.state == state), None)

    def _plan(self, state: Any) -> Blob | None:
        found = self._find(state)
        return None if found is None else Blob({}, [self._disk.snapshots.plan(found).pack()])

    def _chunk(self, state: Any, index: Any) -> Blob | None:
        found = self._find(state)
        chunk = None if found is None or type(index) is not int else self._disk.snapshots.chunk(found, index)
        return None if chunk is None else Blob({}, [chunk])

    def _aggregate(self, digest: Any) -> Blob | None:
        found = self._disk.aggregates.get(digest) if isinstance(digest, bytes) else None
        return None if found is None else Blob({}, [found])


def _is_head(head: Any) -> bool:
    return isinstance(head, (list, tuple)) and len(head) == 2 and type(head[0]) is int and type(head[1]) is bytes
