"""MemorySwarm itself: parts that are replaced, peers that come back or leave, and checks that can fail."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest

from p2pllm.averaging import Exchange, ExchangeResult, Group, Payload
from p2pllm.averaging.attempt import STREAM_METHOD
from p2pllm.rounds.record import genesis
from p2pllm.state import Layout
from p2pllm.testing import (
    FakeCompute,
    MemoryHost,
    MemoryNetwork,
    MemoryPeer,
    MemorySwarm,
    Parts,
    make_state,
    run,
    virtual,
)

TINY = Layout.of([("x", (8,))])


class NoExchange(Exchange):
    """All members get ones."""

    async def run(self, group: Group, payload: Payload, deadline: float) -> ExchangeResult:
        await asyncio.sleep(0.05)
        return ExchangeResult(np.ones_like(payload), frozenset(), "", 0, 0)


def no_exchange(peer: MemoryPeer) -> Exchange:
    return NoExchange()


def slow_compute(peer: MemoryPeer) -> FakeCompute:
    compute = FakeCompute(peer.number, peer.keeper, peer.view.notify)
    compute.step_s = 5.0
    return compute


@virtual
async def test_parts_can_be_replaced() -> None:
    parts = Parts(layout=TINY, exchange=no_exchange, compute=slow_compute)
    network = MemoryNetwork(latency_s=0.02, jitter_s=0.01)
    swarm = MemorySwarm(network=network, parts=parts, rounds=3, samples=24, deadline_s=60.0)
    peers = swarm.add(6)
    begin = asyncio.get_running_loop().time()
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    assert asyncio.get_running_loop().time() - begin > 10.0
    for peer in peers:
        assert peer.keeper.layout == TINY
        assert STREAM_METHOD not in peer.host.sent
        assert peer.host.sent["beat"].bytes > 0


@dataclass
class Found:
    """What a directory finds of a peer."""

    peer: str
    addresses: tuple[str, ...]
    status: bytes = b""


class Everybody:
    """A directory of all hosts."""

    def __init__(self, peer: MemoryPeer) -> None:
        self.peer = peer

    async def members(self) -> list[Found]:
        hosts = self.peer.swarm.network.hosts.values()
        return [Found(host.peer_id, (host.address,)) for host in hosts if host is not self.peer.host]


@virtual
async def test_peers_find_each_other_through_a_directory_alone() -> None:
    network = MemoryNetwork(needs_addresses=True)
    swarm = MemorySwarm(network=network, parts=Parts(bootstrap=lambda peer: [], directory=Everybody), rounds=4)
    first, second, third = swarm.add(3)
    await swarm.start()
    await asyncio.sleep(2.0)
    assert first.membership.alive() == {second.id, third.id}
    alone = MemorySwarm(network=MemoryNetwork(needs_addresses=True), parts=Parts(bootstrap=lambda peer: []))
    lonely, _ = alone.add(2)
    await alone.start()
    await asyncio.sleep(2.0)
    assert not lonely.membership.alive()


class OwnHost(MemoryHost):
    """A host of another kind."""


class OwnPeer(MemoryPeer):
    """A peer of another kind."""


@virtual
async def test_hosts_and_peers_may_be_of_another_class() -> None:
    class OwnNetwork(MemoryNetwork):
        host_class = OwnHost

    class OwnSwarm(MemorySwarm):
        peer_class = OwnPeer

    swarm = OwnSwarm(network=OwnNetwork(), rounds=3)
    first, second = swarm.add(2)
    await swarm.start()
    second.kill()
    again = swarm.restart(second)
    assert {type(peer) for peer in (first, again)} == {OwnPeer}
    assert {type(peer.host) for peer in (first, again)} == {OwnHost}


def test_the_same_seed_gives_the_same_run() -> None:
    async def times() -> list[float]:
        swarm = MemorySwarm(network=MemoryNetwork(latency_s=0.01, jitter_s=0.01, seed=4), rounds=4)
        first, *_ = swarm.add(2)
        await swarm.start()
        await swarm.finish()
        return list(first.committed_at.values())

    assert run(times()) == run(times())


@pytest.mark.parametrize("keep_disk", [True, False])
@virtual
async def test_a_killed_peer_is_restarted_with_or_without_its_disk(keep_disk: bool) -> None:
    swarm = MemorySwarm(rounds=10**6)
    _, _, third = swarm.add(3)
    await swarm.start()
    await swarm.until(lambda: third.keeper.head[0] == 3)
    third.kill()
    assert swarm.alive == swarm.peers[:2]
    await asyncio.sleep(1.0)
    again = swarm.restart(third, keep_disk=keep_disk)
    assert again.keeper.head == (third.keeper.head if keep_disk else genesis(swarm.manifest.run_id))
    assert again.keeper.state.digest() == (third.keeper.state.digest() if keep_disk else make_state().digest())
    assert not np.shares_memory(again.keeper.state.params, third.keeper.state.params)
    await swarm.start(again)
    await swarm.until(lambda: bool(again.records) and len(again.records[-1].members) == 3)
    swarm.check_states()
    swarm.check_rounds()


@virtual
async def test_who_leaves_is_missed_by_nobody() -> None:
    swarm = MemorySwarm(rounds=8)
    first, second, third = swarm.add(3)
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 3)
    await third.leave()
    assert first.membership.alive() == {second.id}
    assert swarm.alive == [first, second]
    await swarm.finish()
    assert len(first.records) == 8


@virtual
async def test_a_peer_that_fails_fails_the_test_at_once() -> None:
    swarm = MemorySwarm(rounds=10**6)
    first, second = swarm.add(2)

    async def broken(round_number: int) -> None:
        raise ZeroDivisionError

    second.compute.begin = broken
    await swarm.start()
    with pytest.raises(ZeroDivisionError):
        await swarm.until(lambda: first.keeper.head[0] == 10**6)


@virtual
async def test_the_checks_can_fail() -> None:
    swarm = MemorySwarm(rounds=3)
    first, second = swarm.add(2)
    await swarm.start()
    await swarm.finish()
    with pytest.raises(TimeoutError):
        await swarm.until(lambda: False, 1.0)
    first.keeper.state.params[0] += 1.0
    with pytest.raises(AssertionError, match="Peer 0 is not in the state of round 3"):
        swarm.check_states()
    swarm.check_rounds()
    second.records[1] = first.records[1].__class__(**{**vars(first.records[1]), "state_digest": "other"})
    with pytest.raises(AssertionError, match="Round 2 was committed with 2 outcomes"):
        swarm.check_rounds()
