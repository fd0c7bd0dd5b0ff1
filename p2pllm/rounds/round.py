"""One round from a ready update to a result: roster, exchange, vote, and again among the survivors.

Whatever other peers do is a `RoundResult`, never an exception.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from p2pllm.averaging import ExchangeResult, Group
from p2pllm.manifest import RoundSection
from p2pllm.rounds import plan
from p2pllm.rounds.keeper import StateKeeper, aggregate_digest
from p2pllm.rounds.messages import Phase, Roster
from p2pllm.rounds.roster import RosterDesk
from p2pllm.rounds.swarm import SwarmView
from p2pllm.rounds.vote import VoteBox

T = TypeVar("T")

log = logging.getLogger(__name__)

VOTE_WAIT_S = 8.0
"""Longest wait for the others' votes: a member that saw a stall votes up to the stall time-out later."""

MAX_STRIKES = 2
"""Failed attempts that speak against a peer before it is left out of the round; and those that a leader may close."""


class AllReduce(Protocol):
    """What a round needs of an all-reduce."""

    async def run(self, group: Group, vector: np.ndarray, deadline: float) -> ExchangeResult:
        """Average `vector` over the group within `deadline` seconds."""
        ...


@dataclass(frozen=True)
class Update:
    """What this peer contributes to a round."""

    samples: int
    loss: float  # mean training loss, nats a token
    vector: np.ndarray  # float32, shape (parameters,): mean gradient a sample


@dataclass
class RoundResult:
    """What became of a round."""

    committed: bool
    reason: str = ""
    roster: Roster | None = None
    aggregate: np.ndarray | None = None
    aggregate_digest: bytes = b""
    attempts: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"roster": 0.0, "exchange": 0.0, "vote": 0.0})


class RoundRunner:
    """Brings an update into the swarm's next round."""

    def __init__(
        self,
        view: SwarmView,
        desk: RosterDesk,
        votes: VoteBox,
        allreduce: AllReduce,
        keeper: StateKeeper,
        section: RoundSection,
        run_id: str,
    ) -> None:
        self._view = view
        self._desk = desk
        self._votes = votes
        self._allreduce = allreduce
        self._keeper = keeper
        self._section = section
        self._run_id = run_id

    async def run(self, update: Update) -> RoundResult:
        """Average `update` with the others' until one aggregate is agreed on, or the swarm has moved on.

        There is no last attempt: who fails twice is left out, so that in the end those agree who can.
        """
        result = RoundResult(committed=False)
        strikes: Counter[str] = Counter()
        leaders: Counter[str] = Counter()
        while True:
            result.attempts += 1
            gathering = self._desk.gather(update.samples, update.loss, _out(strikes), _out(leaders))
            roster = await self._timed(result, "roster", gathering)
            if roster is None:
                result.reason = "the swarm committed this round without us"
                return result
            result.roster = roster
            culprits = await self._attempt(result, roster, update)
            if result.committed:
                return result
            if len(roster.members) == 1:
                return result  # nobody else to blame
            leaders[self._desk.leader] += 1
            strikes.update(culprits)

    async def _attempt(self, result: RoundResult, roster: Roster, update: Update) -> frozenset[str]:
        """Exchange and vote with one roster, and fill in `result`; returns whom a failure speaks against."""
        group_id = plan.group_id(self._run_id, roster)
        exchange = await self._timed(result, "exchange", self._exchange(group_id, roster, update))
        result.bytes_sent += exchange.bytes_sent
        result.bytes_received += exchange.bytes_received
        own = b""
        if exchange.aggregate is None:
            log.info("round %d, attempt %d: %s", roster.round, result.attempts, exchange.reason)
        else:
            own = await asyncio.to_thread(aggregate_digest, exchange.aggregate)
            self._keeper.propose(own, exchange.aggregate)
        decision, votes = await self._timed(
            result, "vote", self._votes.settle(group_id, roster.members, own, VOTE_WAIT_S)
        )
        if decision.verdict is not plan.Verdict.COMMIT:
            result.reason = exchange.reason or "no aggregate found a majority"
            me = self._view.peer_id
            return plan.culprits(me, roster.members, votes, exchange.failed, exchange.accused)
        result.aggregate = exchange.aggregate
        if own != decision.aggregate:
            holders = [peer for peer, digest in votes.items() if digest == decision.aggregate]
            result.aggregate = await self._keeper.fetch_aggregate(holders, decision.aggregate)
        if result.aggregate is None:
            result.reason = "the committed aggregate could not be fetched"
            return frozenset()
        result.committed, result.reason, result.aggregate_digest = True, "", decision.aggregate
        return frozenset()

    async def _exchange(self, group_id: bytes, roster: Roster, update: Update) -> ExchangeResult:
        """The all-reduce; a roster that cannot be used, as one that was used before, is a failed one."""
        try:
            group = Group(
                group_id=group_id,
                members=roster.members,
                weights=tuple(float(samples) for samples in roster.samples),
                size=self._keeper.layout.size,
                codec=self._section.codec,
            )
            return await self._allreduce.run(group, update.vector, self._section.exchange_deadline_s)
        except ValueError as error:
            return ExchangeResult(None, frozenset(), str(error), 0, 0)

    async def _timed(self, result: RoundResult, phase: Phase, work: Coroutine[object, object, T]) -> T:
        """Announce a phase, await its work, and add its seconds to the result."""
        clock = asyncio.get_running_loop().time
        begin = clock()
        self._view.say(phase=phase)
        try:
            return await work
        finally:
            result.seconds[phase] += clock() - begin


def _out(strikes: Counter[str]) -> frozenset[str]:
    return frozenset(peer for peer, count in strikes.items() if count >= MAX_STRIKES)
