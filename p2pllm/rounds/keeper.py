"""StateKeeper: the shared state of this peer, and how it moves forward.

A round is proposed, then committed. To propose is to take the outer step into a spare state, which gives the digest
that the record needs; the state itself stays as it was until the record has its votes and is on the disk. What a
peer missed it catches up with (`catchup`), in the same spare state.

Memory, with a state of S bytes (4 a parameter and 4 for each moment of the outer optimizer: 12 with AdamW): S for the
state, S for the spare, S while a snapshot is written, and an aggregate (at most 4 a parameter) or two.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from p2pllm.averaging import view_of
from p2pllm.errors import DiskError, StateError
from p2pllm.network.bulk import Blob
from p2pllm.network.transport import Transport
from p2pllm.rounds.catchup import CatchUp
from p2pllm.rounds.chain import Branch, check_claims
from p2pllm.rounds.disk import Disk, copy_of
from p2pllm.rounds.fetching import Fetcher, Refuted
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Body, Checkpoint, Claim, Head, Record
from p2pllm.rounds.serving import Serving
from p2pllm.rounds.threads import to_the_end
from p2pllm.state import Layout, OuterOptimizer, SharedState
from p2pllm.state.chunks import BytesLike, digest_of

log = logging.getLogger(__name__)

MAX_HELD = 4
"""Proposals of one round that are kept: of the attempts that found no majority."""

Aggregate = NDArray[np.float32] | BytesLike

T = TypeVar("T")


class StateKeeper:
    """Holds the state; the only one who changes it and the log."""

    def __init__(self, state: SharedState, optimizer: OuterOptimizer, disk: Disk, transport: Transport) -> None:
        """state: what `disk` recovers to, or round 0. Raises StateError if the log does not know the state's round."""
        self.run_id = disk.run_id
        self.disk = disk
        self.state = state
        self.layout: Layout = state.layout
        self.has_state = state.round > 0 or bytes.fromhex(state.digest()) == disk.initial_state
        """False on a machine that makes other initial weights than the run's: it must have the state from others."""
        self.seconds: dict[str, float] = {}
        """What the last round took here: {"outer_step", "digest", "store", "log"}."""
        self._optimizer = optimizer
        self._spare = _empty(state.layout)
        self._in_spare = b""  # digest of the body whose state lies in the spare
        self._held: OrderedDict[bytes, Body] = OrderedDict()
        self.serving = Serving(disk)
        self._fetcher = Fetcher(transport, disk, state.layout)
        self._catchup = CatchUp(self._fetcher, disk, optimizer)
        self._saving: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        if disk.log.branch.head[0] > state.round:
            log.warning("the log goes on to round %d, but the state is of %d", disk.log.branch.head[0], state.round)
            disk.log.rewind(disk.head_at(state.round))
        self.branch = disk.log.branch
        """The log up to where the state is."""
        if state.round == 0 and self.has_state:
            disk.snapshots.save(state, self.head[1])  # who makes other initial weights needs these

    @property
    def head(self) -> Head:
        """The place in the log where the state is."""
        return self.branch.head

    @property
    def members(self) -> frozenset[str]:
        """Of the newest record."""
        record = self.disk.log.record(self.head[0])
        return frozenset(record.body.peers if record else ())

    @property
    def holding(self) -> bytes:
        """Digest of the body that we last proposed or took over in this round; empty: none."""
        return next(reversed(self._held), b"")

    @property
    def refuted(self) -> set[str]:
        """Peers that `follow` last found to hold something else than they claim; not those that only failed."""
        return self._fetcher.refuted

    # -- a round -----------------------------------------------------------------------------------------------------

    async def propose(self, claims: tuple[Claim, ...], aggregate: Aggregate) -> Body:
        """What the round after the head would be with this aggregate of the claims' updates, in the run's form.

        The aggregate is on the disk then. Raises StateError if it does not fit, or the disk does not take it.
        """
        return await to_the_end(self._propose(claims, view_of(aggregate)))

    async def _propose(self, claims: tuple[Claim, ...], aggregate: memoryview) -> Body:
        clock = asyncio.get_running_loop().time
        async with self._lock:
            digest = await asyncio.to_thread(digest_of, aggregate)
            begin = clock()
            # Written while the outer step computes: neither needs the other.
            storing = asyncio.to_thread(self.disk.aggregates.put, digest, aggregate)
            after, stored = await asyncio.gather(self._step(claims, aggregate), storing, return_exceptions=True)
            if isinstance(after, BaseException):
                raise after
            if isinstance(stored, StateError):
                raise DiskError(str(stored)) from None
            if isinstance(stored, BaseException):
                raise stored
            self.seconds["store"] = max(0.0, clock() - begin - self.seconds["outer_step"] - self.seconds["digest"])
            branch = self.branch
            body = Body(
                run=bytes.fromhex(self.run_id),
                round=branch.head[0] + 1,
                previous=branch.head[1],
                total=branch.total + sum(claim.samples for claim in claims),
                members=claims,
                aggregate=digest,
                state=after,
            )
            self._in_spare = body.digest
            self._held[body.digest] = body
            self._held.move_to_end(body.digest)
            if len(self._held) > MAX_HELD:
                self._held.popitem(last=False)
            return body

    async def _step(self, claims: tuple[Claim, ...], aggregate: BytesLike) -> bytes:
        """The outer step into the spare; returns the digest of what is there then. Raises StateError."""
        clock = asyncio.get_running_loop().time
        begin = clock()
        self._in_spare = b""
        try:
            update = await asyncio.to_thread(self.disk.read, aggregate, claims, self.layout, self.head[0])
        except ValueError as error:
            raise StateError(f"The aggregate of round {self.head[0] + 1} is of no use: {error}.") from None
        await asyncio.to_thread(self._optimizer.step, self.state, update, self._spare)
        stepped = clock()
        digest = bytes.fromhex(await asyncio.to_thread(self._spare.digest))
        self.seconds.update(outer_step=stepped - begin, digest=clock() - stepped)
        return digest

    async def fetch_proposal(self, peers: list[str], digest: bytes, timeout: float) -> Body | None:
        """The body with this digest, which `peers` voted for, unless we hold it; None if our state was wrong.

        timeout: seconds that each of them has. Raises Refuted, which names them, if none gives what our state leads to,
        and StateError, a DiskError if it does not take it, if our disk fails.
        """
        held = self._held.get(digest)
        if held is not None and self._in_spare == digest:
            return held
        try:
            body = held or await self._fetcher.proposal(digest, self.head, peers, timeout)
            await asyncio.to_thread(check_claims, body)
            return await self._take_over(body, await self._aggregate_of(body, peers, timeout))
        except (Refuted, MessageError) as error:
            why = str(error).rstrip(".")
        raise Refuted(f"The proposal of {', '.join(peers)} is refused: {why}.")

    async def _aggregate_of(self, body: Body, peers: list[str], timeout: float) -> BytesLike:
        try:
            found = await self._fetcher.aggregate(body, peers, timeout)
        except StateError as error:
            raise DiskError(str(error)) from None  # not the fault of who gave it
        if found is None:
            raise Refuted("none of them gives its aggregate")
        return found

    async def _take_over(self, body: Body, aggregate: Aggregate) -> Body | None:
        """Propose what others did; None if our state was wrong. Raises as `fetch_proposal`."""
        try:
            mine = await self.propose(body.members, aggregate)
        except DiskError:
            raise
        except StateError as error:
            raise Refuted(str(error)) from None
        if mine.digest == body.digest:
            return mine
        self._held.pop(mine.digest, None)
        if not await self.check():
            return None
        raise Refuted("our state does not lead there")

    def forget(self, digest: bytes) -> None:
        """We do not hold this proposal any more: it cannot be settled."""
        self._held.pop(digest, None)

    async def commit(self, record: Record) -> dict[str, float]:
        """Take the round that the record tells of; returns the seconds of its parts.

        The record is on the disk before anything moves. Raises StateError if the disk does not take it; nothing has
        changed then. If cancelled, it ends first: half a commit would be none.
        """
        return await to_the_end(self._commit(record))

    async def _commit(self, record: Record) -> dict[str, float]:
        clock = asyncio.get_running_loop().time
        async with self._lock:
            digest = record.body.digest
            if self._in_spare != digest:
                found = await asyncio.to_thread(self.disk.aggregates.get, record.body.aggregate)
                if found is None or await self._step(record.body.members, found) != record.body.state:
                    raise StateError(f"The aggregate of round {record.body.round} is damaged here.")
            begin = clock()
            await self._catchup.settle()
            await asyncio.to_thread(self.disk.log.append, record)
            self.seconds["log"] = clock() - begin
            await self._move()
            return dict(self.seconds)

    async def _move(self) -> None:
        """The spare becomes the state; the parameters are overwritten, since the worker maps their memory."""
        old, new = self.state, self._spare
        np.copyto(old.params, new.params)
        self.state = SharedState(self.layout, [old.params, *new.moments.values()], round=new.round)
        self._spare = SharedState(self.layout, [new.params, *old.moments.values()])
        self._in_spare = b""
        self._held.clear()
        self.branch, self.has_state = self.disk.log.branch, True
        try:
            if self.disk.is_snapshot_round(new.round) or self.disk.is_full:
                await self._save()
        except StateError as error:  # the round is taken all the same
            log.error("%s", error)

    # -- what others hold ---------------------------------------------------------------------------------------------

    async def follow(self, branch: Branch, peers: list[str], others: Sequence[str] = ()) -> bool:
        """Move to `branch`, which `peers` claim to hold, or further along it; False if none could help.

        others: may have parts of it, too.
        Our state changes only when another one is whole and is the one that the records name.
        """
        async with self._lock:
            self._in_spare = b""
            before = self.head
            own = self.state if self.has_state else None
            if not await self._catchup.run(branch, peers, own, self._spare, others):
                self.branch = self.disk.log.branch  # there may be a new checkpoint on it
                return False
            if self.disk.log.branch.head != before or not self.has_state:
                await to_the_end(self._move())
            if self._catchup.dropped:  # then only a snapshot leads here
                await self._save(at_once=True)
            self.branch = self.disk.log.branch
            return True

    async def mend(self, peers: list[str]) -> None:
        """Fetch records again that are damaged on our disk."""
        async with self._lock:
            await self._catchup.mend(peers)

    async def check(self) -> bool:
        """Whether the state is what its record says; if not, it is made anew from the disk."""
        async with self._lock:
            record = self.disk.log.record(self.head[0])
            right = record.body.state if record else self.disk.initial_state
            if bytes.fromhex(await asyncio.to_thread(self.state.digest)) == right or (record is None and self.head[0]):
                return True
            log.error("the state in memory is not that of round %d any more; making it anew", self.head[0])
            state = await asyncio.to_thread(self.disk.recover, self._optimizer, None)
            if state is None:
                self.has_state = False
                return False
            if state.round < self.head[0]:
                self.disk.log.rewind(self.disk.head_at(state.round))
            self._spare = state
            await self._move()
            return False

    async def anchor(self, checkpoint: Checkpoint) -> bool:
        """Take the organiser's checkpoint; True if it was new."""
        async with self._lock:
            await self._catchup.settle()
            new = await asyncio.to_thread(self.disk.log.add_checkpoint, checkpoint)
            self.branch = self.disk.log.branch
            return new

    async def serve(self, request: dict[str, Any]) -> Blob | None:
        """Answer another peer's fetch, see `serving`."""
        if request.get("what") == "proposal":
            newest = self.disk.log.record(self.head[0])  # who committed still gives it to who could not
            bodies = [*self._held.values(), *([newest.body] if newest else [])]
            body = next((body for body in bodies if body.digest == request.get("digest")), None)
            return None if body is None else Blob({}, [body.pack()])
        return await self.serving.answer(request)

    # -- snapshots ---------------------------------------------------------------------------------------------------

    async def _save(self, at_once: bool = False) -> None:
        """Write a snapshot in the background: of a copy, since rounds go on. at_once: return when it is there."""
        if self._saving is not None and not self._saving.done():
            if not at_once:
                return
            await asyncio.wait({self._saving})
        old = await asyncio.to_thread(self.disk.aggregates.digests)
        state, record = await asyncio.to_thread(copy_of, self.state), self.head[1]

        async def save() -> None:
            try:
                await asyncio.to_thread(self.disk.save, state, record, old)
            except StateError as error:
                log.error("%s", error)  # the one before still stands, and its aggregates

        self._saving = asyncio.create_task(save())
        if at_once:
            await asyncio.wait({self._saving})

    async def close(self) -> None:
        """Wait for a snapshot that is being written, and close the log."""
        if self._saving is not None:
            await asyncio.wait({self._saving})
        async with self._lock:
            self.disk.close()


def _empty(layout: Layout) -> SharedState:
    return SharedState.initial(layout, np.zeros(layout.size, np.float32))
