"""Whole swarms in memory: whatever happens to one peer, the others go on, and all hold the same bits."""

from __future__ import annotations

import pytest

from p2pllm.rounds.messages import Phase
from p2pllm.testing import MemoryPeer, MemorySwarm, virtual

PHASES: list[Phase] = ["collecting", "roster", "exchange", "vote", "commit"]


def delay_of(survivor: MemoryPeer, round_: int) -> float:
    """Seconds between the commits before and after the round that `round_` names, less than 0.5 if undisturbed."""
    return survivor.committed_at[round_ + 1] - survivor.committed_at[round_]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@virtual
async def test_peers_train_together_bit_identically(count: int) -> None:
    swarm = MemorySwarm(rounds=6)
    swarm.add(count)
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    for peer in swarm.peers:
        # The first round may close before everybody has heard of everybody.
        full = [record for record in peer.records if len(record.members) == count]
        assert len(full) >= 5
        assert [record.attempts for record in peer.records] == [1] * len(peer.records)
    assert swarm.peers[0].keeper.head[0] == 6


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_a_peer_is_killed(phase: Phase, victim: int) -> None:
    swarm = MemorySwarm()
    peers = swarm.add(3)
    swarm.fail_at(peer=victim, round=2, phase=phase, how="kill", delay=0.0015)
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    survivors = [peer for peer in peers if peer is not peers[victim]]
    for peer in survivors:
        assert len(peer.records[-1].members) == 2
        assert delay_of(peer, 2) + delay_of(peer, 3) < 3.5


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_a_peer_freezes(phase: Phase, victim: int) -> None:
    swarm = MemorySwarm()
    swarm.add(3)
    swarm.fail_at(peer=victim, round=2, phase=phase, how="freeze", delay=0.0015)
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    for peer in swarm.alive:
        assert len(peer.records[-1].members) == 2
        assert delay_of(peer, 2) + delay_of(peer, 3) < 9.5


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_a_peer_freezes_and_goes_on(phase: Phase, victim: int) -> None:
    """It wakes in the middle of a round that is long over, with all its time-outs due at once."""
    swarm = MemorySwarm(rounds=10**6)
    peers = swarm.add(3)
    for peer in peers:
        peer.compute.step_s = 1.0
    swarm.fail_at(peer=victim, round=2, phase=phase, how="freeze", delay=0.0015, for_s=30.0)
    await swarm.start()
    await swarm.until(lambda: peers[victim].host.frozen)
    await swarm.until(lambda: not peers[victim].host.frozen)
    await swarm.until(lambda: all(len(peer.records[-1].members) == 3 for peer in peers))
    swarm.check_states()
    swarm.check_rounds()


@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_a_peer_is_killed_and_comes_back_with_its_disk(phase: Phase) -> None:
    swarm = MemorySwarm(rounds=10**6)
    first, second, _ = swarm.add(3)
    swarm.fail_at(peer=2, round=2, phase=phase, how="kill", delay=0.0015, for_s=4.0)
    await swarm.start()
    await swarm.until(lambda: swarm.peers[2].host.dead)
    await swarm.until(lambda: len(swarm.alive) == 3)
    again = swarm.peers[2]
    assert again.keeper.head[0] >= 2
    await swarm.until(lambda: bool(again.records) and all(len(p.records[-1].members) == 3 for p in (first, second)))
    swarm.check_states()
    swarm.check_rounds()


@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_of_two_peers_one_is_killed(phase: Phase) -> None:
    swarm = MemorySwarm()
    first, _ = swarm.add(2)
    swarm.fail_at(peer=1, round=2, phase=phase, how="kill", delay=0.0015)
    await swarm.start()
    await swarm.finish()
    assert len(first.records) == 5
    assert len(first.records[-1].members) == 1


@virtual
async def test_a_worker_without_updates_holds_up_nobody() -> None:
    swarm = MemorySwarm(rounds=5, roster_wait_s=10.0)
    first, second, barren = swarm.add(3)
    barren.compute.fruitless = 10**6
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    assert first.committed_at[5] - first.committed_at[1] < 4 * 3.0
    assert not barren.records
    assert barren.keeper.head == first.keeper.head
    assert len(second.records[-1].members) == 2


@virtual
async def test_a_worker_that_failed_once_takes_part_again() -> None:
    swarm = MemorySwarm(rounds=10)
    first, second = swarm.add(2)
    second.compute.fruitless = 1
    await swarm.start()
    await swarm.finish()
    assert len(first.records[-1].members) == 2


@virtual
async def test_a_slow_peer_delays_a_round_by_the_roster_wait_at_most() -> None:
    swarm = MemorySwarm(rounds=5, samples=8)
    first, second, slow = swarm.add(3)
    slow.compute.step_s = 1000.0
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 5)
    longest = max(delay_of(first, round_) for round_ in range(1, 5))
    assert longest < 2.0 + 3.0 + 1.0  # the wait, the grace of a leader, the work
    assert not slow.records
    assert second.keeper.head == first.keeper.head


@virtual
async def test_no_update_is_computed_twice_for_a_failed_attempt() -> None:
    swarm = MemorySwarm()
    peers = swarm.add(3)
    swarm.fail_at(peer=2, round=2, phase="exchange", how="kill", delay=0.0015)
    await swarm.start()
    await swarm.finish()
    for peer in peers[:2]:
        assert max(record.attempts for record in peer.records) == 2
        assert peer.compute.finished == len(peer.records) == 5


@virtual
async def test_who_stops_leaves_a_swarm_that_goes_on() -> None:
    swarm = MemorySwarm(rounds=8)
    first, second, third = swarm.add(3)
    third.at("collecting", 4, third.loop.stop)
    await swarm.start()
    await swarm.until(lambda: third.task is not None and third.task.done())
    await third.leave()
    await swarm.finish()
    swarm.check_rounds()
    assert len(first.records) == len(second.records) == 8


@virtual
async def test_nothing_grows_with_the_rounds() -> None:
    swarm = MemorySwarm(rounds=30)
    peers = swarm.add(2)
    await swarm.start()
    await swarm.finish()
    for peer in peers:
        assert not peer.votes._open
        assert sum(len(kept) for kept in peer.votes._early.values()) <= 4
        assert not peer.votes._sending
        assert not peer.desk._telling
        assert len(peer.view._heard) <= 2


@pytest.mark.parametrize("count", [2, 3, 5])
@virtual
async def test_rounds_far_shorter_than_heartbeats_split_nobody_off(count: int) -> None:
    swarm = MemorySwarm(rounds=50)
    peers = swarm.add(count)
    await swarm.start()
    # They find each other in rounds of an ordinary length.
    await swarm.until(lambda: all(peer.records and len(peer.records[-1].members) == count for peer in peers))
    for number, peer in enumerate(peers):
        peer.compute.step_s, peer.compute.batch = 0.004 + 0.002 * number, 64
    await swarm.finish()
    swarm.check_rounds()
    for peer in peers:
        assert sum(len(record.members) == count for record in peer.records) >= 45
