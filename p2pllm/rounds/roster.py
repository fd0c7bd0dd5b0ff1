"""Who takes part in a round: the leader gathers enrolments and closes the roster.

The leader is the first living peer in an order that everybody computes (`plan.ranked`). A member enrols with
it; the leader closes as soon as everyone who is known alive is in, or after the wait that the manifest states,
and sends the roster to its members. A leader that does not answer, or does not close in time, is passed over.
The leader decides nothing but who is in: weights are the members' own, and a wrong roster makes no aggregate.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pllm.errors import NetworkError
from p2pllm.manifest import RoundSection
from p2pllm.network.transport import Transport
from p2pllm.rounds import plan
from p2pllm.rounds.messages import Enrol, EnrolReply, MessageError, Roster
from p2pllm.rounds.swarm import SwarmView

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0
"""A peer that does not acknowledge a small message in this time is passed over."""

LEADER_GRACE_S = 3.0
"""How much longer than the roster wait a member waits for a leader that acknowledged."""

Clock = Callable[[], float]


@dataclass
class _Gathering:
    """What is known of the round that is being closed."""

    head: plan.Head
    enrolments: dict[str, Enrol] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)  # leaders that hold our enrolment
    closed: Roster | None = None


class RosterDesk:
    """Both sides of closing a roster: asking a leader, and being one."""

    def __init__(
        self, transport: Transport, view: SwarmView, section: RoundSection, run_id: str, clock: Clock = time.monotonic
    ) -> None:
        self._transport = transport
        self._view = view
        self._run_id = run_id
        self._wait_s = section.roster_wait_s
        self._max_peers = section.max_peers
        self._clock = clock
        self._now = _Gathering(head=(-1, b""))

    async def start(self) -> None:
        """Answer other peers' enrolments and rosters."""
        await self._transport.serve_call("enrol", self._on_enrol)
        await self._transport.serve_call("roster", self._on_roster)

    def others_are_over(self) -> bool:
        """More than half of the other peers at our head have enrolled with us: their round is over."""
        head = self._view.own.head
        if self._now.head != head:
            return False
        others = plan.taking_part(head, self._view.statuses())
        return 2 * len(self._now.enrolments.keys() & others) > len(others)

    async def gather(self, samples: int, loss: float) -> Roster | None:
        """Enrol our update of `samples` samples and return the closed roster with us in it.

        None if the swarm is at another head, so that there is no round for us to take part in.
        """
        head, me = self._view.own.head, self._view.peer_id
        gathering = self._at(head)
        gathering.closed = None
        gathering.asked.clear()
        enrol = Enrol(round=head[0], digest=head[1], samples=samples, loss=loss)
        gathering.enrolments[me] = enrol
        started = self._clock()
        passed_over: set[str] = set()
        asked_since = started
        leader = ""
        while True:
            if gathering.closed is not None:
                return gathering.closed
            candidates = plan.taking_part(head, self._view.statuses())
            if plan.head_to_follow(head, self._view.statuses()) is not None:
                return None
            first = plan.ranked(self._run_id, head, (candidates - passed_over) | {me})[0]
            if first == me:
                if candidates <= gathering.enrolments.keys() or self._clock() - started > self._wait_s:
                    return await self._close(gathering)
            elif first != leader:
                leader, asked_since = first, self._clock()
                if not await self._ask(gathering, first, enrol):
                    passed_over.add(first)
                    leader = ""
                    continue
            elif self._clock() - asked_since > self._wait_s + LEADER_GRACE_S:
                log.info("round %d: leader %s did not close the roster", head[0], first[-8:])
                passed_over.add(first)
                continue
            await self._view.wait_change(0.2)

    def _at(self, head: plan.Head) -> _Gathering:
        """The gathering of the round after `head`; a newer head starts an empty one."""
        if self._now.head != head:
            self._now = _Gathering(head=head)
        return self._now

    async def _ask(self, gathering: _Gathering, leader: str, enrol: Enrol) -> bool:
        """Enrol with `leader`; False if it does not answer or does not take it."""
        gathering.asked.add(leader)
        try:
            reply = EnrolReply.unpack(await self._transport.call(leader, "enrol", enrol.pack(), CALL_TIMEOUT_S))
        except (NetworkError, MessageError) as error:
            log.info("round %d: leader %s does not answer: %s", enrol.round, leader[-8:], error)
            return False
        return reply.accepted

    async def _close(self, gathering: _Gathering) -> Roster:
        """Close with who is in, ourselves included, and tell the others."""
        me = self._view.peer_id
        alive = self._view.statuses().keys()
        present = [peer for peer in gathering.enrolments if peer == me or peer in alive]
        members = plan.ranked(self._run_id, gathering.head, present)
        if len(members) > self._max_peers:
            members = [me, *[peer for peer in members if peer != me][: self._max_peers - 1]]
        enrolled = [gathering.enrolments[peer] for peer in members]
        roster = Roster(
            round=gathering.head[0],
            digest=gathering.head[1],
            nonce=secrets.token_bytes(16),
            members=tuple(members),
            samples=tuple(enrol.samples for enrol in enrolled),
            losses=tuple(enrol.loss for enrol in enrolled),
        )
        # An enrolment counts for one attempt: for the next one a member enrols again, or it is not there.
        gathering.enrolments.clear()
        payload = roster.pack()
        await asyncio.gather(*(self._tell(peer, payload) for peer in members if peer != me))
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
        accepted = (enrol.round, enrol.digest) == own.head and own.phase not in ("done", "leaving", "joining")
        if accepted:
            self._at(own.head).enrolments[peer] = enrol
            self._view.hear_head(peer, own.head)
        return EnrolReply(accepted=accepted, round=own.round, digest=own.digest).pack()

    async def _on_roster(self, peer: str, payload: bytes) -> bytes:
        roster = Roster.unpack(payload)
        gathering, me = self._now, self._view.peer_id
        mine = gathering.enrolments.get(me)
        if (
            roster.head != gathering.head
            or peer not in gathering.asked
            or mine is None
            or me not in roster.members
            or roster.samples[roster.members.index(me)] != mine.samples
        ):
            raise MessageError("this roster is not for an update of ours")
        gathering.closed = roster
        for member in roster.members:
            self._view.hear_head(member, roster.head)
        return b""
