"""Keepers on hosts of a memory network, with logs that they really made: no votes on the way, no main loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from p2pllm.network.bulk import Blob, BulkServer
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.keeper import StateKeeper
from p2pllm.rounds.record import Body, Claim, Head, Record, sign_vote
from p2pllm.state import AdamW, Layout
from p2pllm.testing import LAYOUT, MemoryNetwork, identity_number, make_manifest, make_state, peer_number

EVERY = 8
"""Rounds between two snapshots."""

Answer = Callable[[dict[str, Any]], Any]


def gradient(seed: int, layout: Layout = LAYOUT) -> np.ndarray:
    """Some aggregate, the same for a seed."""
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)


def claims_of(head: Head, *numbers: int, samples: int = 4) -> tuple[Claim, ...]:
    """What these peers bring to the round after `head`."""
    return tuple(Claim.sign(identity_number(number), head, samples, 1.0, bytes(32)) for number in numbers)


def record_of(body: Body, *numbers: int) -> Record:
    """The body with the votes of these peers."""
    return Record.of(body, {peer_number(number): sign_vote(identity_number(number), body.digest) for number in numbers})


def changed(body: Body, **fields: Any) -> Body:
    """Another body; `model_copy` would keep the digest of the old one."""
    return Body(**{name: getattr(body, name) for name in Body.model_fields} | fields)


class Node:
    """One keeper that serves what it has."""

    def __init__(
        self,
        network: MemoryNetwork,
        number: int,
        folder: Path | None = None,
        *,
        layout: Layout = LAYOUT,
        seed: int = 0,
        **section: Any,
    ) -> None:
        """folder: of a disk that may hold a former life. seed: another one than 0 makes other initial weights."""
        self.number = number
        self.host = network.host(number)
        self.id = self.host.peer_id
        self.manifest = make_manifest(layout, rounds=10**6, **section)
        self.optimizer = AdamW(self.manifest.optimizer, self.manifest.round.rounds, layout)
        self.disk = Disk(folder, self.manifest, layout)
        state = self.disk.recover(self.optimizer, make_state(seed=seed, layout=layout))
        assert state is not None
        self.keeper = StateKeeper(state, self.optimizer, self.disk, self.host)
        self.answer: Answer = self.keeper.serve  # what it gives to those who fetch; a test may replace it
        self.asked: list[dict[str, Any]] = []

    async def start(self) -> Node:
        """Serve."""
        await BulkServer(self.host, self._serve).start()
        return self

    async def _serve(self, request: dict[str, Any]) -> Blob | None:
        self.asked.append(request)
        blob: Blob | None = await self.answer(request)
        return blob

    @property
    def what(self) -> list[str]:
        """What it was asked for."""
        return [request["what"] for request in self.asked]

    @property
    def head(self) -> Head:
        """Where its state is."""
        return self.keeper.head

    def follow(self, *others: Node) -> Any:
        """Follow the branch of the first of `others`, which all are said to hold."""
        return self.keeper.follow(others[0].keeper.branch, [other.id for other in others])


async def make_nodes(count: int, **fields: Any) -> list[Node]:
    """So many nodes of one network, which serve; a snapshot is made every EVERY rounds."""
    network = MemoryNetwork()
    section = {"snapshot_every": EVERY, **fields}
    return [await Node(network, number, **section).start() for number in range(count)]


async def saved(*nodes: Node) -> None:
    """Snapshots are written behind the rounds: until they are."""
    for node in nodes:
        if node.keeper._saving is not None:
            await node.keeper._saving


async def commit(*nodes: Node, seed: int = 0, samples: int = 4) -> Record:
    """One round that these commit together, with an aggregate by seed and so many samples each."""
    vector, numbers = gradient(seed, nodes[0].keeper.layout), [node.number for node in nodes]
    claims = claims_of(nodes[0].head, *numbers, samples=samples)
    bodies = [await node.keeper.propose(claims, vector) for node in nodes]
    assert len(set(bodies)) == 1
    record = record_of(bodies[0], *numbers)
    for node in nodes:
        await node.keeper.commit(record)
    return record


async def train(*nodes: Node, rounds: int, samples: int = 4) -> None:
    """So many rounds that these commit together."""
    for _ in range(rounds):
        await commit(*nodes, seed=nodes[0].head[0] + 1000 * nodes[0].number, samples=samples)


def frozen(node: Node) -> tuple[Any, ...]:
    """All that a failed attempt must leave as it was."""
    return node.keeper.branch, node.keeper.state.digest(), node.keeper.state.params.tobytes()
