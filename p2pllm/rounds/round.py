"""One round from a ready update to a result: roster, exchange, vote, and again among the survivors.

Whatever other peers do is a `RoundResult`, never an exception. The protocol is on one page in README.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

from p2pllm.averaging import Exchange, ExchangeResult, Group, Payload, view_of
from p2pllm.errors import DiskError, StateError
from p2pllm.identity import Identity
from p2pllm.rounds import plan
from p2pllm.rounds.fetching import Refuted
from p2pllm.rounds.gathering import Offer
from p2pllm.rounds.keeper import StateKeeper
from p2pllm.rounds.messages import Phase, Roster
from p2pllm.rounds.pace import Deadline
from p2pllm.rounds.record import Body, Claim, Record, sign_holding
from p2pllm.rounds.roster import RosterDesk
from p2pllm.rounds.swarm import SwarmView
from p2pllm.rounds.update import Packed, Update
from p2pllm.rounds.vote import Ballot, VoteBox
from p2pllm.sections import RoundSection
from p2pllm.state import span_of
from p2pllm.state.chunks import digest_of

K = TypeVar("K", str, bytes)
T = TypeVar("T")

log = logging.getLogger(__name__)

VOTE_FACTOR, VOTE_FLOOR_S, VOTE_CAP_S = 4.0, 8.0, 60.0
"""Wait for the others' votes: so many times what it lately took, within these bounds in seconds. A member that saw a
stall votes up to the stall time-out later, hence the floor."""

SHORTEST_ATTEMPT_S = 0.5
"""A failed attempt takes at least this long, the wait for the next one included: p2pd refuses at once to dial a peer
again that it could not reach a moment ago."""

EXCHANGE_FACTOR, EXCHANGE_FLOOR_S, EXCHANGE_CAP_S = 4.0, 15.0, 3600.0
"""Time for an exchange in which bytes move, by the same rule; who is silent is found much sooner."""

SLOWEST_BYTES_PER_S = 62_500
"""Half a Mbit/s: before the first exchange is measured, one gets the time that its bytes take at this rate."""

MAX_STRIKES = 2
"""Failed attempts that speak against a peer before it is left out of the round; that a leader may close; and in which
one proposal may fail."""


@dataclass
class RoundResult:
    """What became of a round."""

    record: Record | None = None  # to be committed; None: there is none of this round for us
    included: bool = False  # our update is in it
    reason: str = ""
    failures: list[str] = field(default_factory=list)  # what failed here in all attempts, also where one committed
    attempts: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"roster": 0.0, "exchange": 0.0, "vote": 0.0})


@dataclass
class _Proposed:
    """What an attempt has for us to vote on, and how the exchange went."""

    body: Body | None
    exchange: ExchangeResult
    trouble: DiskError | None = None


class RoundRunner:
    """Brings an update into the swarm's next round."""

    def __init__(
        self,
        identity: Identity,
        view: SwarmView,
        desk: RosterDesk,
        votes: VoteBox,
        exchange: Exchange,
        keeper: StateKeeper,
        section: RoundSection,
    ) -> None:
        self._identity = identity
        self._view = view
        self._desk = desk
        self._votes = votes
        self.exchange = exchange
        self._keeper = keeper
        self._section = section
        self._met: set[tuple[Claim, ...]] = set()  # claims of the exchanges that we were in with what was packed last
        unmeasured_s = EXCHANGE_FLOOR_S + 2 * 4 * keeper.layout.size / SLOWEST_BYTES_PER_S
        self._exchange_time = Deadline(EXCHANGE_FACTOR, EXCHANGE_FLOOR_S, EXCHANGE_CAP_S, first=unmeasured_s)
        self._vote_time = Deadline(VOTE_FACTOR, VOTE_FLOOR_S, VOTE_CAP_S, first=VOTE_FLOOR_S)

    async def pack(self, update: Update) -> Packed:
        """An update as it travels, claimed for the round after our head."""
        payload = await asyncio.to_thread(self.exchange.pack, update.vector)
        digest = await asyncio.to_thread(digest_of, view_of(payload))
        head = self._keeper.head
        self._met.clear()
        return Packed(head, Claim.sign(self._identity, head, update.samples, update.loss, digest), payload, update)

    async def run(self, offered: Packed) -> RoundResult:
        """Average what is offered with the others' until one record is agreed on, or the swarm has moved on.

        There is no last attempt: who fails twice is left out, so that in the end those agree who can. Raises StateError
        if our disk fails: a DiskError if it does not take what we would vote for.
        """
        clock = asyncio.get_running_loop().time
        result = RoundResult()
        strikes: Counter[str] = Counter()
        leaders: Counter[str] = Counter()
        proposals: Counter[bytes] = Counter()  # that failed
        suspects: frozenset[str] = frozenset()
        while True:
            result.attempts += 1
            offer = self._offer(offered.claim, _out(proposals))
            gathering = self._desk.gather(offer, _out(strikes), _out(leaders), suspects)
            roster = await self._timed(result, "roster", gathering)
            if roster is None:
                result.reason = "the swarm committed this round without us"
                return result
            closed_at = clock()
            culprits = await self._attempt(result, roster, offered.payload)
            if result.record is not None:
                result.included = offered.claim in result.record.body.members
                return result
            if len(roster.members) == 1:
                await asyncio.sleep(SHORTEST_ATTEMPT_S)
                return result  # nobody else to blame
            leaders[self._desk.leader] += 1
            proposals[roster.proposal] += 1
            strikes.update(culprits)
            suspects = plan.suspects(roster.members, culprits)
            await asyncio.sleep(max(0.0, closed_at + SHORTEST_ATTEMPT_S - clock()))

    def _offer(self, claim: Claim, failed: frozenset[bytes]) -> Offer:
        holding = self._keeper.holding
        proof = sign_holding(self._identity, self._keeper.head, holding) if holding else b""
        return Offer(claim, self._keeper.members, holding, proof, failed)

    async def _attempt(self, result: RoundResult, roster: Roster, payload: Payload) -> frozenset[str]:
        """Exchange and vote with one roster, and fill in `result`; returns whom a failure speaks against."""
        group_id = plan.group_id(self._keeper.run_id, roster)
        proposed = await self._propose(result, group_id, roster, payload)
        own = proposed.body.digest if proposed.body else b""
        voting = self._votes.settle(group_id, roster.members, own, self._vote_time.seconds)
        clock = asyncio.get_running_loop().time
        begin = clock()
        decision, ballot = await self._timed(result, "vote", voting)
        if proposed.exchange.reason:  # also if the others commit: who failed here is to be known
            result.failures.append(proposed.exchange.reason)
        if decision.verdict is plan.Verdict.COMMIT:
            self._vote_time.note(clock() - begin)
            await self._take(result, proposed.body, decision.body, ballot)
            return frozenset()
        return await self._blame(result, roster, proposed, ballot)

    async def _take(self, result: RoundResult, own: Body | None, committed: bytes, ballot: Ballot) -> None:
        """Put what was committed into `result`, from who voted for it if it is not what we voted for."""
        body, why = own, ""
        if own is None or own.digest != committed:
            body, why = await self._fetched(ballot.holders(committed), committed, len(ballot.members))
        if body is not None:
            result.record, result.reason = ballot.record(body), ""
            return
        result.reason = why or "our state does not lead to what was committed"
        result.failures.append(result.reason)

    async def _blame(self, result: RoundResult, roster: Roster, proposed: _Proposed, ballot: Ballot) -> frozenset[str]:
        """An attempt found no majority: whom that speaks against."""
        exchange, own = proposed.exchange, proposed.body.digest if proposed.body else b""
        result.reason = exchange.reason or "no record found a majority"
        if not exchange.reason:
            result.failures.append(result.reason)
        log.info("round %d, attempt %d: %s", roster.round, result.attempts, result.reason)
        if proposed.trouble is not None:
            raise proposed.trouble  # the others know that we have nothing
        if own and any(voted not in (b"", own) for voted in ballot.votes.values()):
            await self._keeper.check()  # somebody's state is wrong: is it ours?
        return plan.culprits(self._view.peer_id, roster.members, ballot.votes, exchange.failed, exchange.accused)

    async def _propose(self, result: RoundResult, group_id: bytes, roster: Roster, payload: Payload) -> _Proposed:
        """What we would commit: what the roster's proposal says, or what comes out of the exchange.

        If it cannot be voted for here because our disk does not take it, that is its `trouble`.
        """
        try:
            if roster.proposal:
                return await self._timed(result, "exchange", self._settle(roster))
            exchange = await self._timed(result, "exchange", self._reduce(group_id, roster, payload))
            result.bytes_sent += exchange.bytes_sent
            result.bytes_received += exchange.bytes_received
            if exchange.aggregate is None:
                return _Proposed(None, exchange)
            return _Proposed(await self._keeper.propose(roster.claims, exchange.aggregate), exchange)
        except StateError as error:
            log.error("round %d cannot be voted for: %s", roster.round, error)
            nothing = ExchangeResult(reason=str(error))
            return _Proposed(None, nothing, error if isinstance(error, DiskError) else None)

    async def _settle(self, roster: Roster) -> _Proposed:
        """The roster's proposal. If it cannot be used, that speaks against all who hold it."""
        body, why = await self._fetched(roster.holding, roster.proposal, len(roster.members))
        if body is not None and (unfit := self._unfit(body, roster)):
            self._keeper.forget(body.digest)
            body, why = None, f"The proposal of {', '.join(roster.holding)} is refused: {unfit}."
        failed = frozenset(roster.holding) - {self._view.peer_id} if why else frozenset[str]()
        reason = "" if body else why or "our state did not lead to the proposal, and was made anew"
        return _Proposed(body, ExchangeResult(failed=failed, reason=reason))

    def _unfit(self, body: Body, roster: Roster) -> str:
        """Why a proposal that is right in itself is not to be settled by this roster; empty: it is."""
        if not plan.speaks_for(body.peers, roster.members):
            return "it is without half of the roster"
        ours = next((claim for claim in roster.claims if claim.peer == self._view.peer_id), None)
        if ours in body.members and body.members not in self._met:
            return "no exchange that we were in was of these updates"
        return ""

    async def _fetched(self, holders: list[str], digest: bytes, members: int) -> tuple[Body | None, str]:
        """A body that these voted for, or None; and what was wrong with theirs, if our state is right.

        Holders may have to give it to all other members, one after another, so each has an exchange's time for each.
        """
        timeout = self._exchange_time.seconds * max(1, members - len(holders))
        try:
            return await self._keeper.fetch_proposal(holders, digest, timeout), ""
        except Refuted as error:
            return None, str(error)

    async def _reduce(self, group_id: bytes, roster: Roster, payload: Payload) -> ExchangeResult:
        """The exchange; a roster that cannot be used, as one that was used before, is a failed one."""
        self._met.add(roster.claims)
        first, last = span_of(self._keeper.layout.size, self._section.fragments, roster.round)
        try:
            group = Group(
                group_id=group_id,
                members=roster.members,
                weights=tuple(float(claim.samples) for claim in roster.claims),
                size=last - first,
                codec=self._section.codec,
                digests=tuple(claim.update for claim in roster.claims),
            )
            begin = asyncio.get_running_loop().time()
            exchange = await self.exchange.run(group, payload, self._exchange_time.seconds)
            if exchange.aggregate is not None:
                self._exchange_time.note(asyncio.get_running_loop().time() - begin)
            return exchange
        except ValueError as error:
            return ExchangeResult(None, frozenset(), str(error), 0, 0)

    async def _timed(self, result: RoundResult, phase: Phase, work: Coroutine[object, object, T]) -> T:
        """Announce a phase, await its work, and add its seconds to the result."""
        clock = asyncio.get_running_loop().time
        begin = clock()
        # who is in the roster knows of the exchange; who is not hears with the next beat, which its patience outlasts
        self._view.say(phase=phase, at_once=phase != "exchange")
        try:
            return await work
        finally:
            result.seconds[phase] += clock() - begin


def _out(strikes: Counter[K]) -> frozenset[K]:
    return frozenset(struck for struck, count in strikes.items() if count >= MAX_STRIKES)
