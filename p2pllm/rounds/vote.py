"""After the exchange: every member signs the body of the record that it would commit, and the roster judges together.

`plan.decide` is the rule; this is the post office. A vote that arrives before we know its group is kept, within
a bound, because a faster peer may vote before our own exchange has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pllm.errors import NetworkError
from p2pllm.identity import Identity
from p2pllm.network.transport import Transport
from p2pllm.rounds import plan
from p2pllm.rounds.messages import Vote
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Body, Record, is_vote, sign_vote
from p2pllm.rounds.swarm import SwarmView

CALL_TIMEOUT_S = 2.0
"""A member that does not take a vote in this time will not vote either."""

MAX_EARLY = 4
"""Votes of one peer that are kept for groups that we do not know (yet), the newest. A bound for each peer, so
that nobody can push out what others voted."""

MAX_EARLY_PEERS = 256


@dataclass
class Ballot:
    """The votes of one attempt: by member the body that it voted for, empty for none, and its signature."""

    members: tuple[str, ...]
    votes: dict[str, bytes] = field(default_factory=dict)
    signatures: dict[str, bytes] = field(default_factory=dict)

    def take(self, peer: str, vote: Vote) -> None:
        """Count a member's first vote, if it signed it."""
        if peer not in self.members or peer in self.votes:
            return
        if vote.body and not is_vote(peer, vote.body, vote.signature):
            raise MessageError("this vote is not signed by who sent it")
        self.votes[peer] = vote.body
        self.signatures[peer] = vote.signature

    def record(self, body: Body) -> Record:
        """The record of `body` with the votes for it."""
        return Record.of(body, {p: self.signatures[p] for p, voted in self.votes.items() if voted == body.digest})

    def holders(self, body: bytes) -> list[str]:
        """Who voted for the body with this digest."""
        return [peer for peer, voted in self.votes.items() if voted == body]


class VoteBox:
    """Sends our vote, collects the others', and reports the decision."""

    def __init__(self, transport: Transport, view: SwarmView, identity: Identity) -> None:
        self._transport = transport
        self._view = view
        self._identity = identity
        self._open: dict[bytes, Ballot] = {}  # group -> its votes
        self._early: OrderedDict[str, OrderedDict[bytes, Vote]] = OrderedDict()  # peer -> group -> vote
        self._sending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take other peers' votes."""
        await self._transport.serve_call("vote", self._on_vote)

    async def settle(
        self, group: bytes, members: tuple[str, ...], body: bytes, timeout: float
    ) -> tuple[plan.Decision, Ballot]:
        """Cast our vote (the digest of a body, or empty) and wait for the decision, at most `timeout` seconds.

        Returns the decision and the votes that are known; RETRY if none is reached in time. Our vote may still be
        on its way to slow members then, for at most CALL_TIMEOUT_S.
        """
        me = self._view.peer_id
        own = Vote(group=group, body=body, signature=sign_vote(self._identity, body) if body else b"")
        ballot = Ballot(members)
        ballot.take(me, own)
        self._take_early(group, ballot)
        others = frozenset(members) - {me}
        # Whom membership does not know is judged by the call alone: the leader may see it better than we do.
        known = others & self._view.statuses().keys()
        unreachable: set[str] = set()

        def decision() -> plan.Decision:
            # Whoever voted counts, even if it died right after.
            gone = unreachable | (known - self._view.statuses().keys())
            return plan.decide(members, ballot.votes, frozenset(gone - ballot.votes.keys()))

        self._open[group] = ballot
        try:
            for peer in (member for member in members if member != me):
                self._send(peer, own, unreachable.add)
            await self._view.wait_until(lambda: decision().verdict is not plan.Verdict.WAIT, timeout)
        finally:
            del self._open[group]
        final = decision()
        if final.verdict is plan.Verdict.WAIT:
            final = plan.Decision(plan.Verdict.RETRY)
        return final, ballot

    def _take_early(self, group: bytes, ballot: Ballot) -> None:
        for peer in ballot.members:
            vote = self._early[peer].pop(group, None) if peer in self._early else None
            if vote is not None:
                with contextlib.suppress(MessageError):
                    ballot.take(peer, vote)

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
            self._open[vote.group].take(peer, vote)
            self._view.notify()
            return b""
        early = self._early.setdefault(peer, OrderedDict())
        early.setdefault(vote.group, vote)
        while len(early) > MAX_EARLY:
            early.popitem(last=False)
        while len(self._early) > MAX_EARLY_PEERS:
            self._early.popitem(last=False)
        return b""
