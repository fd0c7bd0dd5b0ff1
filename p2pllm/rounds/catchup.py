"""Catching up: fetching the records, snapshots and aggregates that a peer lacks from those who have them.

First the log moves: the records after the last one that we share are fetched and checked. Then the state follows,
from ours, from a snapshot on our disk, or from one that is fetched, and replays the rest. If the state cannot be had,
the log goes back to where it was. Everything is named by a digest that the records hold, so whoever gives it is not
trusted. What does not live here: when to do it (`plan`, `loop`), who may change the state (`keeper`), and the other
side (`serving`).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from p2pllm.errors import NetworkError, StateError
from p2pllm.network.bulk import fetch
from p2pllm.network.transport import Transport
from p2pllm.rounds.chain import Branch, check_links, check_votes
from p2pllm.rounds.disk import OTHER_STEP, Disk, as_vector
from p2pllm.rounds.download import Download
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import MAX_RECORD_BYTES, Body, Checkpoint, Head, Record, unpack_all
from p2pllm.rounds.serving import MAX_ITEMS, MAX_PAGE_RECORDS, PAGE_BYTES
from p2pllm.state import CHUNK_BYTES, AdamW, ChunkPlan, Layout, SharedState

log = logging.getLogger(__name__)

MAX_TAKEN = 100_000
"""Records that are fetched before the state follows; for more it is done again."""

SNAPSHOT_COST = 3
"""A snapshot has as many bytes as three aggregates: to replay fewer is cheaper than to fetch one."""

PLAN_BYTES = 32 << 20
"""Bound on the digests of a state's chunks: 1 TB of state."""

Vector = NDArray[np.float32]


class Refuted(Exception):  # noqa: N818 - a finding about a peer, not an error
    """What a peer gave cannot be right."""


@dataclass(frozen=True)
class _Offer:
    """A snapshot that peers have."""

    round: int
    record: bytes
    state: bytes
    peers: tuple[str, ...]


class CatchUp:
    """Fetches what we lack."""

    def __init__(self, transport: Transport, disk: Disk, optimizer: AdamW, layout: Layout) -> None:
        self.refuted: set[str] = set()
        """Peers that gave something in the last `run` that cannot be right."""
        self._transport = transport
        self._disk = disk
        self._optimizer = optimizer
        self._layout = layout

    async def run(self, branch: Branch, peers: list[str], own: SharedState | None, into: SharedState) -> bool:
        """Move the log to `branch`, or further along it, and make the state there in `into`.

        peers: claim to hold it. own: our state, at our log's head; None: we have none. False if it is not to be had;
        the log is then as it was. Raises StateError if our own disk fails.
        """
        self.refuted.clear()
        for peer in peers:
            try:
                if await self._from(peer, branch, peers, own, into):
                    return True
            except (Refuted, MessageError) as error:
                log.warning("what %s claims is refuted: %s", peer[-8:], error)
                self.refuted.add(peer)
            except NetworkError as error:
                log.info("catching up with %s failed: %s", peer[-8:], error)
        return False

    async def _from(
        self, peer: str, branch: Branch, peers: list[str], own: SharedState | None, into: SharedState
    ) -> bool:
        before = self._disk.log.branch
        base, abandoned = await self._move_log(peer, branch)
        try:
            state = own if own is not None and before.head == base else None
            await self._make(state, [peer, *(other for other in peers if other != peer)], into)
        except BaseException:
            await asyncio.to_thread(self._disk.log.switch, base, abandoned)
            raise
        if abandoned:
            after = self._disk.log.branch
            log.warning(
                "moved to a branch with more behind it: rounds %d to %d of ours are abandoned, we are at round %d",
                base[0] + 1, before.head[0], after.head[0],
            )  # fmt: skip
        return True

    # -- records -----------------------------------------------------------------------------------------------------

    async def _move_log(self, peer: str, branch: Branch) -> tuple[Head, list[Record]]:
        """Take the peer's records; returns the last record that we share, and those of ours that came after it."""
        own = self._disk.log.branch
        base, records = await self._page(peer, [list(head) for head in self._disk.log.sample()])
        if not self._disk.log.has(base):
            raise Refuted("it does not say where our logs part")
        at, taken = Branch(base, self._total_at(base), 0), list[Record]()
        while records:
            await asyncio.to_thread(self._check, records, at)
            at = Branch(records[-1].head, records[-1].body.total, 0)
            if not taken:  # what we tell of our log has gaps, so the first records may be ours, too
                base = max((record.head for record in records if self._disk.log.has(record.head)), default=base)
            taken += [record for record in records if record.body.round > base[0]]
            if at.head[0] >= branch.head[0] or len(taken) >= MAX_TAKEN:
                break
            _, records = await self._page(peer, [list(at.head)])
        if not taken and branch.head != own.head:
            raise Refuted("it has no records that we lack")
        anchored = self._anchor(base, taken)
        if Branch(at.head, at.total, anchored).rank < own.rank:
            raise Refuted("its log has less behind it than ours")
        abandoned = await asyncio.to_thread(self._disk.log.switch, base, taken)
        return base, abandoned

    async def _page(self, peer: str, heads: list[Any]) -> tuple[Head, list[Record]]:
        """The records of `peer` after the latest of the heads that it knows, as many as it sends at once."""
        got = await fetch(self._transport, peer, {"what": "log", "heads": heads}, PAGE_BYTES + MAX_RECORD_BYTES)
        if got is None:
            raise Refuted("it has no log")
        header, body = got
        for packed in _list(header.get("checkpoints"))[:MAX_ITEMS]:
            if isinstance(packed, bytes):
                self._disk.log.add_checkpoint(Checkpoint.unpack(packed))
        base = _list(header.get("base"))
        if len(base) != 2 or type(base[0]) is not int or type(base[1]) is not bytes:
            raise Refuted("it does not say where our logs part")
        return (base[0], base[1]), await asyncio.to_thread(unpack_all, bytes(body), MAX_PAGE_RECORDS)

    def _check(self, records: list[Record], base: Branch) -> None:
        check_links(records, base, self._disk.run_id)
        for record in records:
            check_votes(record)

    def _total_at(self, head: Head) -> int:
        record = self._disk.log.record(head[0]) if head[0] else None
        if record is None and head[0]:
            raise StateError(f"The record of round {head[0]} is damaged here.")
        return record.body.total if record else 0

    def _anchor(self, base: Head, records: list[Record]) -> int:
        """Round of the newest checkpoint on a log that goes from `base` over `records`."""
        heads = {record.head for record in records}
        rounds = [
            point.round
            for point in self._disk.log.checkpoints
            if point.head in heads or (point.round <= base[0] and self._disk.log.has(point.head))
        ]
        return max(rounds, default=0)

    # -- the state -----------------------------------------------------------------------------------------------------

    async def _make(self, own: SharedState | None, peers: list[str], into: SharedState) -> None:
        """Make the state at the log's head in `into`. Raises StateError, NetworkError or Refuted."""
        last = self._disk.log.branch.head[0]
        base = own or await asyncio.to_thread(self._disk.newest_base)
        lacking = self._lacking(base.round if base else -1, last)
        if base is None or lacking > SNAPSHOT_COST:
            offer = await self._best_offer(peers)
            if offer is not None and (base is None or SNAPSHOT_COST + self._lacking(offer.round, last) < lacking):
                base = await self._fetch_snapshot(offer)
        if base is None:
            raise NetworkError("Nobody gives a snapshot of this log.")
        await asyncio.to_thread(_copy, base, into)
        while into.round < last:
            await self._replay_one(into, peers)

    def _lacking(self, round_: int, last: int) -> int:
        """Aggregates that have to be fetched to replay from `round_`."""
        records = (self._disk.log.record(number) for number in range(round_ + 1, last + 1))
        return sum(record is None or not self._disk.aggregates.has(record.body.aggregate) for record in records)

    async def _replay_one(self, state: SharedState, peers: list[str]) -> None:
        record = await asyncio.to_thread(self._disk.log.record, state.round + 1)
        if record is None:
            raise StateError(f"The record of round {state.round + 1} is damaged here.")
        vector = await self.aggregate(record.body.aggregate, peers)
        if vector is None:
            raise NetworkError(f"Nobody gives the aggregate of round {record.body.round}.")
        await asyncio.to_thread(self._optimizer.step, state, vector)
        if bytes.fromhex(await asyncio.to_thread(state.digest)) != record.body.state:
            if len(record.votes) > 1:
                raise StateError(OTHER_STEP.format(round=record.body.round))  # more than one peer came there
            raise Refuted(f"round {record.body.round} does not lead to the state that its record names")

    async def aggregate(self, digest: bytes, peers: list[str]) -> Vector | None:
        """The aggregate with this digest, from our disk or else the first of `peers` that gives it; on our disk then."""
        size = self._layout.size
        vector = await asyncio.to_thread(self._disk.aggregate, digest, size)
        for peer in peers if vector is None else ():
            got = await self._ask(peer, {"what": "aggregate", "digest": digest}, 4 * size)
            if got is not None and await asyncio.to_thread(_digest, got[1]) == digest:
                vector = as_vector(got[1], size)
                if vector is not None:
                    await asyncio.to_thread(self._disk.aggregates.put, digest, got[1])
                    break
        return vector

    async def proposal(self, peer: str, digest: bytes) -> Body | None:
        """The body with this digest that `peer` voted for; None if it does not give it."""
        got = await self._ask(peer, {"what": "proposal", "digest": digest}, MAX_RECORD_BYTES)
        try:
            body = None if got is None else Body.unpack(bytes(got[1]))
        except MessageError:
            return None
        return body if body is not None and body.digest == digest else None

    async def _best_offer(self, peers: list[str]) -> _Offer | None:
        """The newest snapshot of our log that any of `peers` has, with all who have it."""
        answers = await asyncio.gather(*(self._ask(peer, {"what": "snapshots"}, 0) for peer in peers))
        found: dict[tuple[int, bytes, bytes], list[str]] = {}
        for peer, answer in zip(peers, answers, strict=True):
            for item in _list(answer and answer[0].get("snapshots"))[:MAX_ITEMS]:
                key = _list(item)
                if len(key) == 3 and self._names(*key):
                    found.setdefault((key[0], key[1], key[2]), []).append(peer)
        if not found:
            return None
        best = max(found)
        return _Offer(*best, peers=tuple(found[best]))

    def _names(self, round_: Any, record: Any, state: Any) -> bool:
        """Whether our log says that this is the state after that round. There is no record of round 0."""
        if type(round_) is not int or not isinstance(record, bytes) or not self._disk.log.has((round_, record)):
            return False
        if round_ == 0:
            return bool(state == self._disk.initial_state)
        known = self._disk.log.record(round_)
        return known is not None and bool(known.body.state == state)

    async def _fetch_snapshot(self, offer: _Offer) -> SharedState:
        """Download a snapshot, chunk by chunk, and keep it."""
        incoming = None
        for peer in offer.peers:
            got = await self._ask(peer, {"what": "plan", "state": offer.state}, PLAN_BYTES)
            try:
                plan = None if got is None else ChunkPlan.unpack(bytes(got[1]), self._layout)
            except StateError as error:
                raise Refuted(str(error)) from None
            if plan is not None and plan.digest == offer.state:
                incoming = await asyncio.to_thread(self._disk.snapshots.incoming, plan, offer.record)
                break
        if incoming is None:
            raise NetworkError(f"Nobody gives the chunks of round {offer.round}.")

        async def one(peer: str, index: int) -> bool | None:
            got = await self._ask(peer, {"what": "chunk", "state": offer.state, "index": index}, CHUNK_BYTES)
            return None if got is None else await asyncio.to_thread(incoming.put, index, bytes(got[1]))

        missing = await asyncio.to_thread(incoming.missing)
        log.info("fetching %d chunks of round %d from %d peers", len(missing), offer.round, len(offer.peers))
        download = Download(missing, offer.peers, one)
        done = await download.run()
        self.refuted |= download.liars
        if not done:
            raise NetworkError(f"The snapshot of round {offer.round} was broken off; what came is kept.")
        return await asyncio.to_thread(lambda: self._disk.snapshots.load(incoming.finish()))

    async def _ask(self, peer: str, request: dict[str, Any], max_bytes: int) -> tuple[dict[str, Any], bytearray] | None:
        try:
            return await fetch(self._transport, peer, request, max_bytes)
        except NetworkError as error:
            log.info("%s", error)
            return None


def _list(value: Any) -> tuple[Any, ...]:
    """A sequence from a peer, or nothing."""
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def _digest(data: bytearray) -> bytes:
    return bytes(blake3(data, max_threads=blake3.AUTO if len(data) >= 1 << 20 else 1).digest())


def _copy(base: SharedState, into: SharedState) -> None:
    for old, new in ((base.params, into.params), (base.m, into.m), (base.v, into.v)):
        np.copyto(new, old)
    into.round, into.beta1_power, into.beta2_power = base.round, base.beta1_power, base.beta2_power
