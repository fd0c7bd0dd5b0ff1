"""Catching up: from where our log and state are to where the swarm's are.

First the log moves: the records after the last one that we share are fetched and checked. Then the state follows,
from ours, from a snapshot on our disk, or from one that is fetched, and replays the rest. If the state cannot be had,
the log goes back to where it was. What does not live here: when to do it (`plan`, `loop`), who may change the state
(`keeper`), and asking others (`fetching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Sequence

from p2pllm.errors import NetworkError, StateError
from p2pllm.rounds.chain import Branch, check_links, check_votes
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.fetching import Fetcher, Refuted
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Body, Head, Record
from p2pllm.state import Layout, OuterOptimizer, SharedState

log = logging.getLogger(__name__)

MAX_TAKEN = 100_000
"""Records that are fetched before the state follows; for more it is done again."""

SNAPSHOT_COST = 3
"""A snapshot has as many bytes as three aggregates: to replay fewer is cheaper than to fetch one."""


class CatchUp:
    """Moves our log, and makes the state that it leads to."""

    def __init__(self, fetcher: Fetcher, disk: Disk, optimizer: OuterOptimizer) -> None:
        self._fetcher = fetcher
        self._disk = disk
        self._optimizer = optimizer
        self._owed: tuple[Head, list[Record]] | None = None  # where the log must go back to
        self.dropped = False
        """The last `run` replayed more aggregates than the disk may hold, so those on it do not lead to the state."""

    async def run(
        self, branch: Branch, peers: list[str], own: SharedState | None, into: SharedState, others: Sequence[str] = ()
    ) -> bool:
        """Move the log to `branch`, or further along it, and make the state there in `into`.

        peers: claim to hold it. own: our state, at our log's head; None: we have none. others: asked for snapshots and
        aggregates, too. False if it is not to be had; the log is then as it was. Raises StateError if our own disk
        fails.
        """
        self._fetcher.refuted.clear()
        self.dropped = False
        await self.settle()
        for peer in peers:
            try:
                if await self._from(peer, branch, [*peers, *others], own, into):
                    return True
            except (Refuted, MessageError) as error:
                log.warning("what %s claims is refuted: %s", peer[-8:], error)
                self._fetcher.refuted.add(peer)
            except NetworkError as error:
                log.info("catching up with %s failed: %s", peer[-8:], error)
        return False

    async def settle(self) -> None:
        """Move the log back to where the state is, if that is owed. Raises StateError if the disk fails."""
        if self._owed is not None:
            await asyncio.to_thread(self._disk.log.switch, *self._owed)
            self._owed = None

    async def _from(
        self, peer: str, branch: Branch, sources: list[str], own: SharedState | None, into: SharedState
    ) -> bool:
        before = self._disk.log.branch
        base, abandoned = await self._move_log(peer, branch)
        try:
            state = own if own is not None and before.head == base else None
            await self._make(state, [peer, *(other for other in sources if other != peer)], into)
        except BaseException:
            self._owed = (base, abandoned)
            await self.settle()
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
        base, records = await self._fetcher.page(peer, [list(head) for head in self._disk.log.sample()])
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
            _, records = await self._fetcher.page(peer, [list(at.head)])
        if not taken and branch.head != own.head:
            raise Refuted("it has no records that we lack")
        anchored = self._anchor(base, taken)
        if Branch(at.head, at.total, anchored).rank < self._disk.log.branch.rank:  # with what it told of checkpoints
            raise Refuted("its log has less behind it than ours")
        abandoned = await asyncio.to_thread(self._disk.log.switch, base, taken)
        return base, abandoned

    async def mend(self, peers: list[str]) -> None:
        """Put back records that are damaged on our disk. What nobody gives stays missing."""
        while lacking := await asyncio.to_thread(self._disk.log.missing):
            put_back = [head for head in lacking if await self._put_back(head, peers)]
            if not put_back:
                return
            log.info("%d damaged records were fetched again", len(put_back))  # and name those before them

    async def _put_back(self, head: Head, peers: list[str]) -> bool:
        for peer in peers:
            record = await self._fetcher.record(peer, head)
            with contextlib.suppress(MessageError):
                if record is not None:
                    await asyncio.to_thread(check_votes, record)
                    return await asyncio.to_thread(self._disk.log.mend, record)
        return False

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
        await self.mend(peers)
        last = self._disk.log.branch.head[0]
        base = own if own and await self._is_right(own) else await asyncio.to_thread(self._disk.newest_base)
        if base is None:
            base = await self._newer(None, peers)
        elif (lacking := len(await self._lacking(base.round, last))) > SNAPSHOT_COST:
            base = await self._newer(base, peers, lacking - SNAPSHOT_COST) or base
        while base is not None:
            await asyncio.to_thread(into.copy_from, base)
            try:
                await self._replay(into, last, peers)
                return
            except NetworkError as error:  # they keep no aggregates from before their snapshots
                log.info("%s", error)
                base = await self._newer(into, peers)
        raise NetworkError("Nobody gives a snapshot of this log, or what leads on from ours.")

    async def _newer(
        self, base: SharedState | None, peers: list[str], most_lacking: float = math.inf
    ) -> SharedState | None:
        """The newest snapshot that can be had, later than `base`, with fewer than `most_lacking` to fetch after it."""
        last = self._disk.log.branch.head[0]
        for offer in await self._fetcher.offers(peers):
            if base is not None and offer.round <= base.round:
                break
            if len(await self._lacking(offer.round, last)) >= most_lacking:
                break
            try:
                return await self._fetcher.snapshot(offer)
            except NetworkError as error:
                log.info("%s", error)  # the next one is older, and others may have it
        return None

    async def _is_right(self, own: SharedState) -> bool:
        """Whether our state is what our log names: memory may be damaged."""
        record = self._disk.log.record(own.round) if own.round else None
        named = record.body.state if record else self._disk.initial_state
        return bytes.fromhex(await asyncio.to_thread(own.digest)) == named

    async def _lacking(self, round_: int, last: int) -> list[Body]:
        """The rounds whose aggregates have to be fetched to replay from `round_`."""

        def read() -> list[Body]:
            records = (self._disk.log.record(number) for number in range(round_ + 1, last + 1))
            bodies = [record.body for record in records if record is not None]
            return [body for body in bodies if not self._disk.aggregates.has(body.aggregate)]

        return await asyncio.to_thread(read)  # of a long log it takes seconds

    async def _replay(self, state: SharedState, last: int, peers: list[str]) -> None:
        """Take `state` to round `last`: fetch as many aggregates as the disk has room for, replay and drop them, again.

        Those that are on the disk already stay: they lead to the state that we had, if this one is not to be had.
        """
        lacking = await self._lacking(state.round, last)
        while state.round < last:
            count = await asyncio.to_thread(self._fitting, lacking, state.layout)
            fetched, lacking = lacking[:count], lacking[count:]
            await self._fetcher.aggregates(fetched, peers)
            while state.round < (lacking[0].round - 1 if lacking else last):
                await self._replay_one(state, peers)
            for body in fetched if lacking else ():
                self.dropped = True
                await asyncio.to_thread(self._disk.aggregates.drop, body.aggregate)

    def _fitting(self, bodies: list[Body], layout: Layout) -> int:
        """How many of these rounds' aggregates the disk has room for, but at least one."""
        form = self._disk.form(layout)
        sizes = itertools.accumulate(form.max_bytes(len(body.members)) for body in bodies)
        room = self._disk.room
        return max(1, sum(1 for _ in itertools.takewhile(lambda size: size <= room, sizes)))

    async def _replay_one(self, state: SharedState, peers: list[str]) -> None:
        record = await asyncio.to_thread(self._disk.log.record, state.round + 1)
        if record is None:
            raise StateError(f"The record of round {state.round + 1} is damaged here.")
        body = record.body
        aggregate = await self._fetcher.aggregate(body, peers)
        if aggregate is None:
            raise NetworkError(f"Nobody gives the aggregate of round {body.round}.")
        try:
            update = await asyncio.to_thread(self._disk.read, aggregate, body.members, state.layout, state.round)
        except ValueError as error:
            raise Refuted(f"the aggregate of round {body.round} is of no use: {error}") from None
        await asyncio.to_thread(self._optimizer.step, state, update)
        if bytes.fromhex(await asyncio.to_thread(state.digest)) != record.body.state:
            # If this is said of every peer, it is this machine that computes the outer step differently.
            raise Refuted(f"round {record.body.round} does not lead to the state that its record names")
