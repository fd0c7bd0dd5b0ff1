"""Partitions of whole swarms in memory: two branches grow, and when their peers meet one of them goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest

from p2pllm.rounds.chain import Branch
from p2pllm.rounds.messages import Phase
from p2pllm.rounds.record import Checkpoint
from p2pllm.rounds.update import Update
from p2pllm.state.chunks import digest_of
from p2pllm.testing import MemoryPeer, MemorySwarm, identity_number, virtual

PHASES: list[Phase] = ["collecting", "roster", "exchange", "vote", "commit"]


async def split(swarm: MemorySwarm, sizes: tuple[int, int] = (2, 3), rounds: int = 12) -> list[list[MemoryPeer]]:
    """Two sides that have gone on without each other from round 3 on."""
    peers = swarm.add(sum(sizes))
    sides = [peers[: sizes[0]], peers[sizes[0] :]]
    await swarm.start()
    await swarm.until(lambda: peers[0].keeper.head[0] == 3)
    swarm.network.partition(*([peer.id for peer in side] for side in sides))
    await swarm.until(lambda: all(peer.keeper.head[0] >= rounds for peer in peers))
    for side in sides:  # they meet when each side is of one mind, so that it is known what each has
        await swarm.until(lambda side=side: len({peer.keeper.head for peer in side}) == 1)  # type: ignore[misc]
    return sides


async def meet(swarm: MemorySwarm) -> None:
    swarm.network.heal()
    count = len(swarm.peers)
    await swarm.until(lambda: all(len(peer.records[-1].members) == count for peer in swarm.peers))
    swarm.check_states()


@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_a_peer_is_cut_off_and_comes_back(phase: Phase) -> None:
    swarm = MemorySwarm(rounds=10**6)
    peers = swarm.add(4)
    lost, network = peers[1], swarm.network
    swarm.fail_at(peer=1, round=2, phase=phase, how="cut", delay=0.0015)
    await swarm.start()
    await swarm.until(lambda: peers[0].keeper.head[0] >= 8 and lost.host.cut_off)
    network.heal()
    await swarm.until(lambda: all(len(peer.records[-1].members) == 4 for peer in peers))
    swarm.check_states()
    others = [{record.round: record.state_digest for record in peer.records} for peer in peers if peer is not lost]
    rounds = set.intersection(*(set(records) for records in others))
    assert max(rounds) >= 8
    assert all(others[0][round_] == others[1][round_] == others[2][round_] for round_ in rounds)


@virtual
async def test_a_partition_heals() -> None:
    swarm = MemorySwarm(rounds=10**6)
    peers = swarm.add(5)
    left, right = peers[:2], peers[2:]
    await swarm.start()
    await swarm.until(lambda: peers[0].keeper.head[0] == 3)
    swarm.network.partition([peer.id for peer in left], [peer.id for peer in right])
    await swarm.until(lambda: all(peer.keeper.head[0] >= 12 for peer in peers))
    assert len({record.state_digest for peer in peers for record in peer.records if record.round == 12}) == 2
    heavier = {record.round: record.state_digest for record in right[0].records}
    swarm.network.heal()
    await swarm.until(lambda: all(len(peer.records[-1].members) == 5 for peer in peers))
    swarm.check_states()
    after = {record.round: record.state_digest for record in right[0].records}
    assert heavier.items() <= after.items()  # the larger side lost nothing


@virtual
async def test_one_link_is_cut_and_the_run_goes_on() -> None:
    swarm = MemorySwarm(rounds=8)
    peers = swarm.add(3)
    await swarm.start()
    await swarm.until(lambda: peers[0].keeper.head[0] == 2)
    swarm.network.cut(peers[0].id, peers[1].id)
    await swarm.finish(600.0)


@virtual
async def test_who_has_fewer_samples_yields_and_says_what_it_left(caplog: pytest.LogCaptureFixture) -> None:
    swarm = MemorySwarm(rounds=10**6)
    sides = await split(swarm)
    light, heavy = sorted(sides, key=lambda side: side[0].keeper.branch.rank)
    left, kept = light[0].keeper.head, heavy[0].keeper.head
    with caplog.at_level(logging.WARNING):
        await meet(swarm)
    for peer in swarm.peers:
        assert peer.disk.log.has(kept)
        assert not peer.disk.log.has(left)
    for peer in light:
        assert left in peer.disk.log.abandoned()
        assert max(head[0] for head in peer.disk.log.abandoned()) >= left[0]
    assert "of ours are abandoned" in caplog.text
    for peer in heavy:
        assert peer.disk.log.abandoned() == []


@virtual
async def test_a_few_who_work_much_win_over_many_who_work_little() -> None:
    swarm = MemorySwarm(rounds=10**6, samples=64)
    peers = swarm.add(5)
    for peer in peers:
        peer.compute.batch = 1
    peers[0].compute.batch = 64
    await swarm.start()
    await swarm.until(lambda: peers[0].keeper.head[0] == 3)
    swarm.network.partition([peers[0].id], [peer.id for peer in peers[1:]])
    await swarm.until(lambda: peers[0].keeper.branch.total > 1.5 * peers[1].keeper.branch.total + 500)
    kept = peers[0].keeper.head
    swarm.network.heal()
    await swarm.until(lambda: all(len(peer.records[-1].members) == 5 for peer in peers))
    assert all(peer.disk.log.has(kept) for peer in peers)


@virtual
async def test_a_checkpoint_of_the_organiser_makes_the_lighter_branch_win() -> None:
    swarm = MemorySwarm(rounds=10**6)
    sides = await split(swarm)
    light, heavy = sorted(sides, key=lambda side: side[0].keeper.branch.rank)
    anchored, left = light[0].keeper.head, heavy[0].keeper.head
    point = Checkpoint.sign(identity_number(0), swarm.manifest.run_id, anchored)  # peer 0 is the founder
    assert await light[0].keeper.anchor(point)
    await meet(swarm)
    for peer in swarm.peers:
        assert peer.disk.log.has(anchored)
        assert peer.keeper.branch.anchor == anchored[0]
    assert all(left in peer.disk.log.abandoned() for peer in heavy)


@virtual
async def test_a_checkpoint_of_anybody_else_moves_nobody() -> None:
    swarm = MemorySwarm(rounds=10**6)
    sides = await split(swarm)
    light, heavy = sorted(sides, key=lambda side: side[0].keeper.branch.rank)
    kept = heavy[0].keeper.head
    point = Checkpoint.sign(identity_number(1), swarm.manifest.run_id, light[0].keeper.head)
    assert not await light[0].keeper.anchor(point)
    await meet(swarm)
    assert all(peer.disk.log.has(kept) for peer in swarm.peers)


@virtual
async def test_the_update_of_who_yields_is_in_its_next_record() -> None:
    swarm = MemorySwarm(rounds=10**6)
    (lost,), others = await split(swarm, (1, 3))
    lost.compute.step_s = 0.3  # so that they meet while it is at work
    pending: list[Update | None] = []
    follow = lost.keeper.follow

    async def watched(branch: Branch, peers: list[str], others: Sequence[str] = ()) -> bool:
        pending.append(lost.loop._pending._kept.get(0))
        lost.compute.step_s = 1000.0  # it has nothing else to bring
        return await follow(branch, peers, others)

    lost.keeper.follow = watched  # type: ignore[method-assign]
    alone = len(lost.records)
    await swarm.until(lambda: len(lost.records) > alone and lost.compute.samples > 0)
    alone = len(lost.records)
    swarm.network.heal()
    await swarm.until(lambda: len(lost.records) > alone)
    update, joint = pending[-1], others[0].disk.log.record(lost.records[alone].round)
    assert update is not None and joint is not None
    assert lost.disk.log.has(joint.head)
    (claim,) = [claim for claim in joint.body.members if claim.peer == lost.id]
    assert (claim.samples, claim.update) == (update.samples, digest_of(update.vector.data.cast("B")))


@virtual
async def test_what_compression_left_out_stays_when_its_branch_is_left() -> None:
    swarm = MemorySwarm(rounds=10**6, strategy="sparse_loco")
    (lost,), others = await split(swarm, (1, 3))
    begin, errors = lost.compute.begin, list[np.ndarray]()

    async def watched(round_number: int) -> None:
        if lost.disk.log.abandoned():
            errors.append(lost.exchange._buffer.error.copy())
        await begin(round_number)

    lost.compute.begin = watched
    follow, before = lost.keeper.follow, list[np.ndarray]()

    async def followed(branch: Branch, peers: list[str], others: Sequence[str] = ()) -> bool:
        before.append(lost.exchange._buffer.error.copy())
        return await follow(branch, peers, others)

    lost.keeper.follow = followed  # type: ignore[method-assign]
    swarm.network.heal()
    await swarm.until(lambda: bool(errors))
    assert others[0].disk.log.has(lost.keeper.head)
    assert before[-1].any()
    np.testing.assert_array_equal(errors[0], before[-1])
