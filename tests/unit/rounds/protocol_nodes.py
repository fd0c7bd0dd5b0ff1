"""Peers with a desk, a vote box and a view, where the test says who lives and what they say; no rounds, no states."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from p2pllm.rounds import plan
from p2pllm.rounds.gathering import Offer
from p2pllm.rounds.messages import Enrol, Vote
from p2pllm.rounds.record import Claim, Head, sign_holding, sign_vote
from p2pllm.rounds.roster import RosterDesk
from p2pllm.rounds.swarm import Liveness, SwarmView
from p2pllm.rounds.vote import VoteBox
from p2pllm.testing import MemoryNetwork, branch, head, identity_number, make_manifest, status

RUN = "5a" * 32
HEAD = head(3, 1)
WAIT = 2.0  # of a roster, as the manifest states it

T = TypeVar("T")


class Node:
    """One peer at HEAD; the test says who lives."""

    def __init__(self, network: MemoryNetwork, number: int) -> None:
        self.host = network.host(number)
        self.identity = identity_number(number)
        self.id = self.host.peer_id
        self.living: set[str] = set()
        self.view = SwarmView(self.id, RUN, last_round=100)
        liveness = SimpleNamespace(
            alive=lambda: frozenset(self.living), push=lambda but=(): None, is_turned_away=lambda: False
        )
        self.view.attach(cast(Liveness, liveness))
        self.view.say(branch=branch(*HEAD), phase="roster")
        section = make_manifest(roster_wait_s=WAIT).round
        self.desk = RosterDesk(self.host, self.view, section, RUN, asyncio.get_running_loop().time)
        self.votes = VoteBox(self.host, self.view, self.identity)

    def hear(
        self, peer: str, round_: int = 3, digest: int = 1, phase: str = "roster", total: int | None = None
    ) -> None:
        """A living peer's status; at HEAD unless told otherwise."""
        self.living.add(peer)
        self.view.hear(peer, status(round_, digest, phase, total=total).pack())

    def claim(self, samples: int = 1, where: Head = HEAD) -> Claim:
        """What it brings to the round after HEAD."""
        return Claim.sign(self.identity, where, samples, 1.0, bytes([samples]) * 32)

    def offer(self, samples: int = 1, **fields: Any) -> Offer:
        """What it brings, for `gather`."""
        if held := fields.get("holding"):
            fields["proof"] = sign_holding(self.identity, HEAD, held)
        return Offer(self.claim(samples), **fields)

    def enrol(self, claim: Claim | None = None, where: Head = HEAD, holding: bytes = b"", proof: bytes = b"") -> bytes:
        """An enrolment at HEAD, packed."""
        mine = claim or self.claim(where=where)
        return Enrol(round=where[0], digest=where[1], claim=mine, holding=holding, proof=proof).pack()

    def vote(self, group: bytes, body: bytes) -> bytes:
        """A vote for a body, packed."""
        return Vote(group=group, body=body, signature=sign_vote(self.identity, body)).pack()


async def make_nodes(count: int) -> list[Node]:
    """All know each other, in the order in which they lead."""
    network = MemoryNetwork()
    nodes = [Node(network, number) for number in range(count)]
    for node in nodes:
        await node.desk.start()
        await node.votes.start()
        for other in nodes:
            if other is not node:
                node.hear(other.id)
    order = plan.ranked(RUN, HEAD, [node.id for node in nodes])
    return sorted(nodes, key=lambda node: order.index(node.id))


async def timed(work: Awaitable[T]) -> tuple[T, float]:
    """The outcome and the virtual seconds that it took."""
    clock = asyncio.get_running_loop().time
    begin = clock()
    return await work, clock() - begin
