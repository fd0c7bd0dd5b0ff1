"""Pauses: a peer computes nothing, hands in what it had, and neither delays a round nor counts as dead."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from p2pllm.rounds.loop import PARK_S
from p2pllm.testing import MemoryPeer, MemorySwarm, virtual


def members(peer: MemoryPeer, round_: int) -> set[str]:
    """Who is in a round that `peer` has."""
    record = peer.disk.log.record(round_)
    assert record is not None
    return set(record.body.peers)


@pytest.mark.parametrize("section", [{}, {"strategy": "diloco", "overlap": True}])
@virtual
async def test_a_paused_peer_hands_in_what_it_has_and_is_back_after_resume(section) -> None:
    swarm = MemorySwarm(rounds=30, samples=24, **section)
    first, _, third = swarm.add(3)
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 4 and third.view.own.samples > 0)
    await third.loop.pause("for a test")
    gathered = third.compute.samples
    await swarm.until(lambda: third.view.own.phase == "paused")
    assert third.id in members(first, 5), "the round in which it had gathered something"
    assert third.compute.samples <= gathered
    begin = first.keeper.head[0]
    await swarm.until(lambda: first.keeper.head[0] == begin + 6)
    assert all(third.id not in members(first, round_) for round_ in range(begin + 2, begin + 7))
    assert third.id in first.membership.alive(), "a pause is no death"
    times = [first.committed_at[round_] for round_ in range(begin + 1, begin + 7)]
    calm = [after - before for before, after in itertools.pairwise(times)]
    assert max(calm) < 1.2 * min(calm), "nobody waits for it"
    at = first.keeper.head[0]
    await third.loop.resume()
    await swarm.until(lambda: third.id in members(first, first.keeper.head[0]))
    assert first.keeper.head[0] <= at + 2
    await swarm.finish()
    swarm.check_rounds()


@virtual
async def test_a_peer_without_samples_pauses_at_once_and_gives_its_memory_back() -> None:
    swarm = MemorySwarm(rounds=1000, samples=24)
    first, second = swarm.add(2)
    second.compute.step_s = 3.0
    await swarm.start()
    await swarm.until(lambda: second.view.own.phase == "collecting")
    await second.loop.pause("for a test")
    await swarm.until(lambda: second.view.own.phase == "paused", timeout=0.5)
    begin = asyncio.get_running_loop().time()
    assert not second.compute.parked
    await swarm.until(lambda: second.compute.parked)
    assert asyncio.get_running_loop().time() - begin == pytest.approx(PARK_S, abs=1.0)
    second.compute.parked = False  # as if it could not be at that moment
    await swarm.until(lambda: second.compute.parked)
    at = second.keeper.head
    await asyncio.sleep(30)
    assert second.keeper.head == at and first.keeper.head[0] > at[0] + 3, "a paused peer fetches nothing"
    await second.loop.resume()
    await swarm.until(lambda: second.id in members(first, first.keeper.head[0]))
    assert not second.compute.parked


@virtual
async def test_a_peer_that_is_alone_commits_what_it_has() -> None:
    swarm = MemorySwarm(rounds=5, samples=1000, deadline_s=3600.0)
    (only,) = swarm.add(1)
    await swarm.start()
    await swarm.until(lambda: only.compute.samples >= 8)
    await only.loop.pause("for a test")
    await swarm.until(lambda: only.view.own.phase == "paused", timeout=5)
    assert only.keeper.head[0] == 1 and only.records[0].samples == 8


@virtual
async def test_a_paused_peer_can_be_stopped() -> None:
    swarm = MemorySwarm(rounds=1000)
    first, second = swarm.add(2)
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 2)
    await second.loop.pause("for a test")
    await swarm.until(lambda: second.compute.parked)
    async with asyncio.timeout(1):
        await second.leave()
