"""The all-reduce over real p2pd: the bits are right, a killed peer is named, nothing hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from cluster import check, make_group, make_vectors

from p2pllm.averaging import DenseAllReduce, Group
from p2pllm.identity import Identity
from p2pllm.network.node import Node, NodeSettings

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

Nodes = dict[str, tuple[Node, DenseAllReduce]]


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """Three peers that know each other's addresses; none is struck only because a busy machine runs it late."""
    async with AsyncExitStack() as stack:
        started: Nodes = {}
        for name in "abc":
            identity = Identity.load_or_create(tmp_path / name / "key")
            node = await Node.start(identity, "5a" * 32, tmp_path / name / "run", NodeSettings())
            stack.push_async_callback(node.stop)
            engine = DenseAllReduce(node, stall_timeout=20.0)
            await engine.start()
            started[node.peer_id] = (node, engine)
        for node, _ in started.values():
            for other, _ in started.values():
                node.learn(other.peer_id, other.addresses())
        yield started


def group_of(nodes: Nodes, size: int, codec: str = "fp32") -> Group:
    template = make_group(len(nodes), size, codec)
    return Group(template.group_id, tuple(nodes), template.weights, size, codec)


@pytest.mark.parametrize("codec", ["fp32", "fp16"])
async def test_same_bits_over_p2pd(nodes: Nodes, codec: str) -> None:
    for _ in range(2):
        group = group_of(nodes, 1_000_003, codec)
        vectors = make_vectors(group)
        results = await asyncio.gather(*(engine.run(group, vectors[peer], 60) for peer, (_, engine) in nodes.items()))
        check(group, vectors, dict(zip(nodes, results, strict=True)))


async def test_a_stopped_peer_is_named_over_p2pd(nodes: Nodes) -> None:
    """Its p2pd ends once the exchange runs: the survivors fail, name it, and go on without it."""
    group = group_of(nodes, 20_000_000)
    vector = np.ones(group.size, np.float32)
    victim, *survivors = nodes
    node, engine = nodes[victim]
    dying = asyncio.create_task(engine.run(group, vector, 60))
    runs = [asyncio.create_task(nodes[peer][1].run(group, vector, 60)) for peer in survivors]
    while node.traffic.sent < 4_000_000:
        assert not dying.done(), f"the exchange ended before its victim was stopped: {dying.result()}"
        await asyncio.sleep(0.002)
    await node.stop()
    for result in await asyncio.gather(*runs):
        assert result.aggregate is None
        assert result.failed.union(*result.accused.values()) == {victim}
    assert (await dying).aggregate is None
    del nodes[victim]
    group = group_of(nodes, 1000)
    vectors = make_vectors(group)
    results = await asyncio.gather(*(nodes[peer][1].run(group, vectors[peer], 60) for peer in survivors))
    check(group, vectors, dict(zip(survivors, results, strict=True)))
