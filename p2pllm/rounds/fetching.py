"""Fetching: records, bodies, aggregates and snapshots from other peers, by digests that we know.

Whoever gives something is not trusted: all of it is bounded, and checked before it is used or kept. What does not live
here: which of it we want (`catchup`), moving the bytes (`network.bulk`), and the other side (`serving`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from p2pllm.errors import NetworkError, StateError
from p2pllm.network.bulk import Fetches
from p2pllm.network.transport import Transport
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.download import Download
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import MAX_RECORD_BYTES, Body, Checkpoint, Head, Record, unpack_all
from p2pllm.rounds.serving import MAX_ITEMS, MAX_PAGE_RECORDS, PAGE_BYTES
from p2pllm.state import CHUNK_BYTES, ChunkPlan, Layout, SharedState
from p2pllm.state.chunks import BytesLike, digest_of

log = logging.getLogger(__name__)

OFFERS_S = 3.0
"""How long to wait for what peers offer, once one has answered."""

PLAN_BYTES = 32 << 20
"""Bound on the digests of a state's chunks: 1 TB of state."""


class Refuted(Exception):  # noqa: N818 - a finding about a peer, not an error
    """What a peer gave cannot be right."""


@dataclass(frozen=True)
class Offer:
    """A snapshot that peers have."""

    round: int
    record: bytes
    state: bytes
    peers: tuple[str, ...]


class Fetcher:
    """Asks other peers for what we lack."""

    def __init__(self, transport: Transport, disk: Disk, layout: Layout) -> None:
        self.refuted: set[str] = set()
        """Peers that gave something that cannot be right, since it was last cleared."""
        self._failures: Counter[str] = Counter()
        self._fetches = Fetches(transport)
        self._disk = disk
        self._layout = layout

    async def page(self, peer: str, heads: list[Any]) -> tuple[Head, list[Record]]:
        """The records of `peer` after the latest of the heads that it knows, as many as it sends at once."""
        got = await self._fetches.fetch(peer, {"what": "log", "heads": heads}, PAGE_BYTES + MAX_RECORD_BYTES)
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

    async def record(self, peer: str, head: Head) -> Record | None:
        """The record with this name; None if `peer` does not give it."""
        request = {"what": "record", "round": head[0], "digest": head[1]}
        got = await self._ask(peer, request, MAX_RECORD_BYTES)
        try:
            record = None if got is None else Record.unpack(bytes(got[1]))
        except MessageError:
            return None
        return record if record is not None and record.head == head else None

    async def aggregate(self, body: Body, peers: list[str], timeout: float | None = None) -> BytesLike | None:
        """The aggregate of a round, from our disk, or from the first of `peers` that gives it and kept there.

        timeout: seconds that each of them has, beside the bounds of `bulk`.
        """
        found = await asyncio.to_thread(self._disk.aggregates.get, body.aggregate)
        for peer in self._by_trust(peers) if found is None else ():
            if await self._aggregate_from(peer, body, timeout):
                return await asyncio.to_thread(self._disk.aggregates.get, body.aggregate)
        return found

    async def aggregates(self, bodies: list[Body], peers: list[str]) -> None:
        """Put as many of these rounds' aggregates as can be had onto our disk, from several of `peers` at once."""

        async def one(peer: str, index: int) -> bool | None:
            return await self._aggregate_from(peer, bodies[index])

        download = Download(range(len(bodies)), self._by_trust(peers), one)
        await download.run()
        self.refuted |= download.liars

    async def _aggregate_from(self, peer: str, body: Body, timeout: float | None = None) -> bool | None:
        """As Fetch in `download`: True once it is on our disk."""
        bound = self._disk.form(self._layout).max_bytes(len(body.members))
        got = await self._ask(peer, {"what": "aggregate", "digest": body.aggregate}, bound, timeout)
        if got is None:
            return None
        if await asyncio.to_thread(digest_of, got[1]) != body.aggregate:
            return False
        await asyncio.to_thread(self._disk.aggregates.put, body.aggregate, got[1])
        return True

    async def proposal(self, digest: bytes, base: Head, peers: list[str], timeout: float) -> Body:
        """The body with this digest, which `peers` voted for as the round after `base`; all are asked at once.

        Raises Refuted if none of them gives it within `timeout` seconds.
        """
        asked = [asyncio.create_task(self._proposal_from(peer, digest)) for peer in peers]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    for answer in asyncio.as_completed(asked):
                        body = await answer
                        if body is not None and body.base == base:
                            return body
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise Refuted("none of them gives it")

    async def _proposal_from(self, peer: str, digest: bytes) -> Body | None:
        got = await self._ask(peer, {"what": "proposal", "digest": digest}, MAX_RECORD_BYTES)
        with contextlib.suppress(MessageError):
            body = None if got is None else Body.unpack(bytes(got[1]))
            return body if body is not None and body.digest == digest else None
        return None

    async def offers(self, peers: list[str]) -> list[Offer]:
        """The snapshots of our log that `peers` have, newest first, each with all who have it."""
        asked = {asyncio.create_task(self._ask(peer, {"what": "snapshots"}, 0)): peer for peer in peers}
        answered, slow = await asyncio.wait(asked, timeout=OFFERS_S)
        if not answered and slow:
            answered, slow = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        for task in slow:
            task.cancel()
        found: dict[tuple[int, bytes, bytes], list[str]] = {}
        for task in asked.keys() & answered:
            answer = task.result()
            for item in _list(answer and answer[0].get("snapshots"))[:MAX_ITEMS]:
                key = _list(item)
                if len(key) == 3 and self._names(*key):
                    found.setdefault((key[0], key[1], key[2]), []).append(asked[task])
        return [Offer(*key, peers=tuple(sorted(found[key]))) for key in sorted(found, reverse=True)]

    def _names(self, round_: Any, record: Any, state: Any) -> bool:
        """Whether our log says that this is the state after that round. There is no record of round 0."""
        if type(round_) is not int or not isinstance(record, bytes) or not self._disk.log.has((round_, record)):
            return False
        if round_ == 0:
            return bool(state == self._disk.initial_state)
        known = self._disk.log.record(round_)
        return known is not None and bool(known.body.state == state)

    async def snapshot(self, offer: Offer) -> SharedState:
        """Download a snapshot, chunk by chunk, and keep it. Raises NetworkError if it is not to be had."""
        plan = await self._plan(offer)
        incoming = await asyncio.to_thread(self._disk.snapshots.incoming, plan, offer.record)

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

    async def _plan(self, offer: Offer) -> ChunkPlan:
        """The digests of a snapshot's chunks, which make the digest that the record names."""
        for peer in self._by_trust(offer.peers):
            got = await self._ask(peer, {"what": "plan", "state": offer.state}, PLAN_BYTES)
            if got is None:
                continue
            with contextlib.suppress(StateError):
                plan = ChunkPlan.unpack(bytes(got[1]), self._layout)
                if plan.digest == offer.state:
                    return plan
            self.refuted.add(peer)
        raise NetworkError(f"Nobody gives the chunks of round {offer.round}.")

    def _by_trust(self, peers: Iterable[str]) -> list[str]:
        """Those first that did not let us down."""
        return sorted(peers, key=lambda peer: (peer in self.refuted, self._failures[peer]))

    async def _ask(
        self, peer: str, request: dict[str, Any], max_bytes: int, timeout: float | None = None
    ) -> tuple[dict[str, Any], bytearray] | None:
        try:
            async with asyncio.timeout(timeout):
                return await self._fetches.fetch(peer, request, max_bytes)
        except (NetworkError, TimeoutError) as error:
            self._failures[peer] += 1
            log.info("%s", str(error) or f"Peer {peer[-8:]} took too long to give a {request['what']}.")
            return None


def _list(value: Any) -> tuple[Any, ...]:
    """A sequence from a peer, or nothing."""
    return tuple(value) if isinstance(value, (list, tuple)) else ()
