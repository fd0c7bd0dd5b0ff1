"""After the exchange: every member says what it holds, and the roster judges together.

`plan.decide` is the rule; this is the post office. A vote that arrives before we know its group is kept, within
a bound, because a faster peer may vote before our own exchange has ended.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from p2pllm.errors import NetworkError
from p2pllm.network.transport import Transport
from p2pllm.rounds import plan
from p2pllm.rounds.messages import Vote
from p2pllm.rounds.swarm import SwarmView

CALL_TIMEOUT_S = 2.0
"""A member that does not take a vote in this time will not vote either."""

MAX_EARLY = 4
"""Votes of one peer that are kept for groups that we do not know (yet), the newest. A bound for each peer, so
that nobody can push out what others voted."""

MAX_EARLY_PEERS = 256


class VoteBox:
    """Sends our vote, collects the others', and reports the decision."""

    def __init__(self, transport: Transport, view: SwarmView) -> None:
        self._transport = transport
        self._view = view
        self._open: dict[bytes, tuple[tuple[str, ...], dict[str, bytes]]] = {}  # group -> members, their votes
        self._early: OrderedDict[str, OrderedDict[bytes, bytes]] = OrderedDict()  # peer -> group -> vote
        self._sending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take other peers' votes."""
        await self._transport.serve_call("vote", self._on_vote)

    async def settle(
        self, group: bytes, members: tuple[str, ...], aggregate: bytes, timeout: float
    ) -> tuple[plan.Decision, dict[str, bytes]]:
        """Cast our vote (`aggregate`: 32 bytes, or empty) and wait for the decision, at most `timeout` seconds.

        Returns the decision and the members' votes known; RETRY if none is reached in time. Our vote may still be
        on its way to slow members then, for at most CALL_TIMEOUT_S.
        """
        me = self._view.peer_id
        votes = {**self._take_early(group, members), me: aggregate}
        others = frozenset(members) - {me}
        # Whom membership does not know is judged by the call alone: the leader may see it better than we do.
        known = others & self._view.statuses().keys()
        unreachable: set[str] = set()

        def decision() -> plan.Decision:
            # Whoever voted counts, even if it died right after.
            gone = unreachable | (known - self._view.statuses().keys())
            return plan.decide(members, votes, frozenset(gone - votes.keys()))

        self._open[group] = (members, votes)
        try:
            for peer in (member for member in members if member != me):
                self._send(peer, Vote(group=group, aggregate=aggregate), unreachable.add)
            await self._view.wait_until(lambda: decision().verdict is not plan.Verdict.WAIT, timeout)
        finally:
            del self._open[group]
        final = decision()
        if final.verdict is plan.Verdict.WAIT:
            final = plan.Decision(plan.Verdict.RETRY)
        return final, votes

    def _take_early(self, group: bytes, members: tuple[str, ...]) -> dict[str, bytes]:
        kept = {peer: self._early[peer] for peer in members if peer in self._early}
        return {peer: votes.pop(group) for peer, votes in kept.items() if group in votes}

    def _send(self, peer: str, vote: Vote, failed: Callable[[str], None]) -> None:
        """Send in the background: a decision must not wait for a member that is frozen."""

        async def send() -> None:
            try:
                await self._transport.call(peer, "vote", vote.pack(), CALL_TIMEOUT_S)
            except NetworkError:
                failed(peer)
                self._view.notify()

        task = asyncio.create_task(send())
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _on_vote(self, peer: str, payload: bytes) -> bytes:
        vote = Vote.unpack(payload)
        if vote.group in self._open:
            members, votes = self._open[vote.group]
            if peer in members:
                votes.setdefault(peer, vote.aggregate)
                self._view.notify()
            return b""
        early = self._early.setdefault(peer, OrderedDict())
        early.setdefault(vote.group, vote.aggregate)
        while len(early) > MAX_EARLY:
            early.popitem(last=False)
        while len(self._early) > MAX_EARLY_PEERS:
            self._early.popitem(last=False)
        return b""
