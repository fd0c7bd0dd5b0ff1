"""Who takes part in a round: the leader gathers enrolments and closes the roster.

The leader is the first living peer in an order that everybody computes (`plan.ranked`). A member enrols with
it; the leader closes as soon as everyone who is known alive is in, or after the wait that the manifest states,
and sends the roster to its members. A leader that does not answer, or does not close in time, is passed over.
The leader decides nothing but who is in: weights are the members' own, and a wrong roster makes no aggregate.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Set

from p2pllm.errors import NetworkError
from p2pllm.network.transport import Transport
from p2pllm.rounds import plan
from p2pllm.rounds.gathering import LEADER_GRACE_S, Gathering, Offer, Search
from p2pllm.rounds.messages import Enrol, EnrolReply, MessageError, Phase, Roster
from p2pllm.rounds.pace import Deadline
from p2pllm.rounds.record import Head
from p2pllm.rounds.swarm import SwarmView
from p2pllm.sections import RoundSection

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
"""A peer that does not acknowledge a small message in this time is passed over."""

ASK_AGAIN_S = 0.5
"""A leader that answered that it is not at our head (yet) is asked again after this."""

SUSPECT_WAIT_S = 0.5
"""How long the next attempt waits for those that the last one failed by: enough for one that is there to enrol."""

MINORITY_WAIT_S = 15.0
"""How long fewer than half of the last round's members wait for the others before they go on without them."""

ROSTER_FACTOR, ROSTER_FLOOR_S = 3.0, 2.0
"""How long a leader waits: so many times what it lately took until all were in, at least so many seconds."""

MAX_ENROLMENTS = 256

BUSY_S = 10.0
"""How much longer than that for a peer that is in an exchange: one that stalls on a frozen member takes 9.1 s."""

IN_ATTEMPT: frozenset[Phase] = frozenset({"exchange", "vote"})

Clock = Callable[[], float]


class RosterDesk:
    """Both sides of closing a roster: asking a leader, and being one."""

    def __init__(
        self,
        transport: Transport,
        view: SwarmView,
        section: RoundSection,
        run_id: str,
        clock: Clock = time.monotonic,
    ) -> None:
        self.leader = ""
        """Who closed the roster that `gather` returned last."""
        self._transport = transport
        self._view = view
        self._run_id = run_id
        cap = section.roster_wait_s
        self._wait = Deadline(ROSTER_FACTOR, ROSTER_FLOOR_S, cap, first=cap)
        self._max_peers = section.max_peers
        self._clock = clock
        self._now = Gathering(head=(-1, b""))
        self._telling: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Answer other peers' enrolments and rosters."""
        await self._transport.serve_call("enrol", self._on_enrol)
        await self._transport.serve_call("roster", self._on_roster)

    def others_are_over(self) -> bool:
        """More than half of the other peers at our head have their updates ready."""
        return plan.is_over(self._view.own.head, self._view.statuses())

    async def gather(
        self,
        offer: Offer,
        left_out: frozenset[str] = frozenset(),
        not_leading: frozenset[str] = frozenset(),
        suspects: frozenset[str] = frozenset(),
    ) -> Roster | None:
        """Enrol what we bring and return the closed roster with us in it.

        left_out: peers that are neither waited for nor taken in. not_leading: peers that are passed over as
        leaders, ourselves too if anybody else is there. suspects: do not lead, and are waited for no longer than
        SUSPECT_WAIT_S. None if the swarm is at another head, so that there is no round for us to take part in.
        """
        head, me = self._view.own.head, self._view.peer_id
        gathering = self._at(head)
        gathering.closed = None
        gathering.asked.clear()
        enrol = Enrol(round=head[0], digest=head[1], claim=offer.claim, holding=offer.holding, proof=offer.proof)
        gathering.enrolments[me] = enrol
        search = Search(self._clock(), dict.fromkeys(left_out | not_leading, math.inf), left_out, suspects)
        while True:
            if gathering.closed is not None:
                roster, self.leader = gathering.closed
                return self._noted(roster, search)
            statuses = self._view.statuses()
            if plan.branch_to_follow(self._view.own.branch, statuses) is not None:
                return None
            first = self._first(head, plan.at_head(head, statuses), search)
            if first != me:
                await self._be_member(gathering, first, search)
            elif self._is_whole(plan.taking_part(head, statuses), gathering, search, offer.former):
                self.leader = me
                return self._noted(self._close(gathering, left_out, offer.failed), search)
            if gathering.closed is None:
                await self._view.wait_change(0.2)

    def _noted(self, roster: Roster, search: Search) -> Roster:
        """Learn how long it takes until all are in."""
        if plan.taking_part(roster.head, self._view.statuses()) - search.left_out <= set(roster.members):
            self._wait.note(self._clock() - search.started)
        else:
            self._wait.missed()
        return roster

    def _at(self, head: Head) -> Gathering:
        """The gathering of the round after `head`; a newer head starts an empty one."""
        if self._now.head != head:
            self._now = Gathering(head=head)
        return self._now

    def _first(self, head: Head, candidates: frozenset[str], search: Search) -> str:
        """The leader: the first in the order that was not passed over; ourselves if nobody else is left."""
        me, now = self._view.peer_id, self._clock()
        passed_over = {peer for peer, until in search.passed_over.items() if until > now}
        ranked = plan.ranked(self._run_id, head, (candidates | {me}) - passed_over - search.suspects)
        return ranked[0] if ranked else me

    def _is_whole(self, others: frozenset[str], gathering: Gathering, search: Search, former: frozenset[str]) -> bool:
        """Everybody is in who is to be waited for, or the wait has passed.

        If none of the others is waited for, the wait has still passed since we began: nobody goes on alone beside
        living peers in haste. Nor do fewer than half of those of the last round: it may be we who are cut off.
        """
        now = self._clock()
        if plan.is_minority(gathering.enrolments.keys(), former) and now - search.started < MINORITY_WAIT_S:
            return False
        if search.leading_since is None:
            search.leading_since = now
        waived = search.left_out | (search.waived - gathering.enrolments.keys())
        if now - search.started > SUSPECT_WAIT_S:
            waived |= search.suspects - gathering.enrolments.keys()
        alone = bool(others) and others <= waived
        patience = search.patience(self._wait.seconds) + self._busy(
            others - gathering.enrolments.keys() - search.left_out
        )
        if now - (search.started if alone else search.leading_since) > patience:
            return True
        return not alone and others - waived <= gathering.enrolments.keys()

    async def _be_member(self, gathering: Gathering, first: str, search: Search) -> None:
        """Enrol with a leader that is new to us; pass over one that fails us."""
        now = self._clock()
        search.leading_since = None
        if first != search.leader:
            search.leader, search.asked_since = first, now
            accepted = await self._ask(gathering, first)
            if not accepted:
                search.leader = ""
                again = self._clock() + ASK_AGAIN_S
                search.passed_over[first] = math.inf if accepted is None else again
                search.waived |= {first} if accepted is None else set()
        elif now - search.asked_since > self._wait.seconds + LEADER_GRACE_S + self._busy({first}):
            log.info("round %d: leader %s did not close the roster", gathering.head[0], first[-8:])
            search.passed_over[first] = math.inf
            search.waived.add(first)

    def _busy(self, peers: Set[str]) -> float:
        """Seconds to wait longer because one of `peers` is in an attempt without us: it comes back, or commits."""
        statuses, head = self._view.statuses(), self._view.own.head
        busy = any(
            statuses[peer].head == head and statuses[peer].phase in IN_ATTEMPT for peer in peers & statuses.keys()
        )
        return BUSY_S if busy else 0.0

    async def _ask(self, gathering: Gathering, leader: str) -> bool | None:
        """Enrol with `leader`; False if it does not take it now, None if it does not answer."""
        gathering.asked.add(leader)
        payload = gathering.enrolments[self._view.peer_id].pack()
        try:
            reply = await self._transport.call(leader, "enrol", payload, CALL_TIMEOUT_S)
            return EnrolReply.unpack(reply).accepted
        except (NetworkError, MessageError) as error:
            log.info("round %d: leader %s does not answer: %s", gathering.head[0], leader[-8:], error)
            return None

    def _close(self, gathering: Gathering, left_out: frozenset[str], failed: frozenset[bytes]) -> Roster:
        """Close with who is in, ourselves included, and tell the others."""
        me = self._view.peer_id
        present = self._view.statuses().keys() & gathering.enrolments.keys() - left_out
        # The order differs from round to round, so a roster that is full leaves out others each time.
        others = plan.ranked(self._run_id, gathering.head, present - {me})[: self._max_peers - 1]
        members = plan.ranked(self._run_id, gathering.head, [me, *others])
        # An enrolment counts for one attempt: for the next one a member enrols again, or it is not there. Who was
        # not taken in still waits for us.
        enrolled = {peer: gathering.enrolments.pop(peer) for peer in members}
        proposal = plan.proposal(enrolled, failed)
        roster = Roster(
            round=gathering.head[0],
            digest=gathering.head[1],
            nonce=secrets.token_bytes(16),
            claims=tuple(enrol.claim for enrol in enrolled.values()),
            proposal=proposal,
            holders=tuple(
                (place, enrolled[peer].proof)
                for place, peer in enumerate(members)
                if proposal and enrolled[peer].holding == proposal
            ),
        )
        payload = roster.pack()
        for peer in others:
            # In the background: a frozen member must not keep us from the exchange with the others.
            task = asyncio.create_task(self._tell(peer, payload))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
        return roster

    async def _tell(self, peer: str, payload: bytes) -> None:
        try:
            await self._transport.call(peer, "roster", payload, CALL_TIMEOUT_S)
        except NetworkError as error:
            # The exchange will fail for lack of this member and be tried again without it.
            log.info("roster not taken by %s: %s", peer[-8:], error)

    async def _on_enrol(self, peer: str, payload: bytes) -> bytes:
        enrol = Enrol.unpack(payload)
        own = self._view.own
        accepted = (enrol.round, enrol.digest) == own.head and own.phase in plan.TAKING_PART
        if accepted:
            if not enrol.is_signed(peer):
                raise MessageError("this claim is not signed by who sent it")
            enrolments = self._at(own.head).enrolments
            if peer not in enrolments and len(enrolments) >= MAX_ENROLMENTS:
                raise MessageError("too many have enrolled")
            enrolments[peer] = enrol
            self._view.hear_ready(peer, own.branch)
        return EnrolReply(accepted=accepted).pack()

    async def _on_roster(self, peer: str, payload: bytes) -> bytes:
        roster = Roster.unpack(payload)
        gathering, me = self._now, self._view.peer_id
        mine = gathering.enrolments.get(me)
        if (
            roster.head != gathering.head
            or peer not in gathering.asked
            or mine is None
            or mine.claim not in roster.claims
            or not roster.is_signed
        ):
            raise MessageError("this roster is not for an update of ours")
        gathering.closed = (roster, peer)
        for member in roster.members:
            self._view.hear_ready(member, self._view.own.branch)
            if member != me:
                # It may have enrolled with us, too, before it found this leader. That was for this attempt: kept,
                # it would let us close the next one with a member that does not know of it.
                gathering.enrolments.pop(member, None)
        return b""
