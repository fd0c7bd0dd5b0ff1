"""After the exchange: every member says what it holds, and the roster judges together.

`plan.decide` is the rule; this is the post office. A vote that arrives before we know its group is kept, within
a bound, because a faster peer may vote before our own exchange has ended.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from p2pllm.errors import NetworkError
from p2pllm.network.transport import Transport
from p2pllm.rounds import plan
from p2pllm.rounds.messages import MAX_ROSTER, Vote
from p2pllm.rounds.swarm import SwarmView

CALL_TIMEOUT_S = 2.0
"""A member that does not take a vote in this time is asked no more."""

MAX_GROUPS = 16
"""Groups whose votes are kept, the newest."""


class VoteBox:
    """Sends our vote, collects the others', and reports the decision."""

    def __init__(self, transport: Transport, view: SwarmView) -> None:
        self._transport = transport
        self._view = view
        self._votes: OrderedDict[bytes, dict[str, bytes]] = OrderedDict()

    async def start(self) -> None:
        """Take other peers' votes."""
        await self._transport.serve_call("vote", self._on_vote)

    async def settle(
        self, group: bytes, members: tuple[str, ...], aggregate: bytes, timeout: float
    ) -> tuple[plan.Decision, dict[str, bytes]]:
        """Cast our vote (`aggregate`: 32 bytes, or empty) and wait for the decision, at most `timeout` seconds.

        Returns the decision and the votes known; RETRY if none is reached in time.
        """
        me = self._view.peer_id
        votes = self._of(group)
        votes[me] = aggregate
        unreachable: set[str] = set()
        others = [peer for peer in members if peer != me]
        sending = asyncio.gather(
            *(self._send(peer, Vote(group=group, aggregate=aggregate), unreachable) for peer in others)
        )

        def decision() -> plan.Decision:
            # Whoever voted counts, even if it died right after.
            dead = (unreachable | (frozenset(others) - self._view.statuses().keys())) - votes.keys()
            return plan.decide(members, votes, frozenset(dead))

        try:
            await self._view.wait_until(lambda: decision().verdict is not plan.Verdict.WAIT, timeout)
            await sending
        finally:
            sending.cancel()
        final = decision()
        if final.verdict is plan.Verdict.WAIT:
            final = plan.Decision(plan.Verdict.RETRY)
        return final, dict(votes)

    def _of(self, group: bytes) -> dict[str, bytes]:
        votes = self._votes.setdefault(group, {})
        while len(self._votes) > MAX_GROUPS:
            self._votes.popitem(last=False)
        return votes

    async def _send(self, peer: str, vote: Vote, unreachable: set[str]) -> None:
        try:
            await self._transport.call(peer, "vote", vote.pack(), CALL_TIMEOUT_S)
        except NetworkError:
            unreachable.add(peer)
            self._view.notify()

    async def _on_vote(self, peer: str, payload: bytes) -> bytes:
        vote = Vote.unpack(payload)
        votes = self._of(vote.group)
        if len(votes) < MAX_ROSTER:
            votes.setdefault(peer, vote.aggregate)
        self._view.notify()
        return b""
