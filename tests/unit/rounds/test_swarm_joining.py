"""Who comes late, comes back or begins anew, in whole swarms in memory: the run goes on from its newest record."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from p2pllm.network.bulk import Blob, BulkServer, Source
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.messages import Phase
from p2pllm.testing import LAYOUT, MemoryNetwork, MemoryPeer, MemorySwarm, make_state, virtual

PHASES: list[Phase] = ["collecting", "roster", "exchange", "vote", "commit"]


def names_of(peer: MemoryPeer, last: int) -> list[bytes | None]:
    """The records of the first rounds of a peer's log."""
    return [peer.disk.log.digest(round_) for round_ in range(last + 1)]


@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_a_joiner_comes_in_any_phase(phase: Phase) -> None:
    swarm = MemorySwarm(rounds=8)
    first, second, _ = swarm.add(3)
    (late,) = swarm.add(1)

    def join() -> None:
        tasks.append(asyncio.create_task(late.start()))

    tasks: list[asyncio.Task[None]] = []
    first.at(phase, 3, join)
    await swarm.start(*swarm.peers[:3])
    await swarm.until(lambda: late.task is not None)
    await swarm.finish()
    swarm.check_rounds()
    assert len(second.records[-1].members) == 4
    assert late.records[0].round >= 4


def round_times(peer: MemoryPeer, rounds: range) -> list[float]:
    """Filled, while the swarm runs, with the virtual time at which the peer begins to collect after each round."""
    times: list[float] = []
    for round_ in rounds:
        peer.at("collecting", round_, lambda: times.append(asyncio.get_running_loop().time()))
    return times


@virtual
async def test_a_joiner_comes_in_although_a_round_is_as_short_as_a_step_of_catching_up() -> None:
    """A peer that is one round behind for good would compute nothing but what nobody takes."""
    swarm = MemorySwarm(network=MemoryNetwork(latency_s=0.15), rounds=40)
    first, second, late = swarm.add(3)
    for peer in swarm.peers:
        peer.compute.step_s = 0.3  # so that two of them collect for half a second
    times = round_times(first, range(5, 25))
    await swarm.start(first, second)
    await swarm.until(lambda: first.keeper.head[0] == 10)
    await late.start()
    await swarm.finish()
    swarm.check_rounds()
    assert [len(record.members) for record in first.records[20:]] == [3] * 20
    calm, *_ = seconds = [after - before for before, after in itertools.pairwise(times)]
    assert sum(each > 1.5 * calm for each in seconds) <= 2 and max(seconds) < calm + 2, "the others wait for it once"


@virtual
async def test_a_joiner_that_is_too_slow_is_not_waited_for_again_and_again() -> None:
    swarm = MemorySwarm(network=MemoryNetwork(latency_s=0.02), rounds=60)
    first, second, late = swarm.add(3)
    for peer in swarm.peers:
        peer.compute.step_s = 0.5
    times = round_times(first, range(5, 60))
    await swarm.start(first, second)
    await swarm.until(lambda: first.keeper.head[0] == 10)
    swarm.network.slow(late.host.peer_id, 0.7)
    await late.start()
    await swarm.until(lambda: first.keeper.head[0] == 60)
    calm, *_ = seconds = [after - before for before, after in itertools.pairwise(times)]
    assert 1 <= sum(each > 2 * calm for each in seconds) <= 6, "after 1, 2, 4, 8, 16 and 32 times"


@virtual
async def test_a_joiner_for_whom_there_is_no_room_trains_no_round_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pllm.network.table.MAX_MEMBERS", 2)
    swarm = MemorySwarm(rounds=10**6)
    first, second, third = swarm.add(3)
    (late,) = swarm.add(1)
    await swarm.start(first, second, third)
    await swarm.until(lambda: first.keeper.head[0] >= 3)
    await late.start()
    await swarm.until(lambda: first.keeper.head[0] >= 15)
    assert late.keeper.head[0] == 0 and late.view.own.phase == "joining"
    await third.leave()  # a dead one of the bootstrap peers would keep its place
    await swarm.until(lambda: late.keeper.head[0] >= 30 and bool(late.records))


@virtual
async def test_a_peer_restarts_at_an_old_state() -> None:
    swarm = MemorySwarm(rounds=12)
    first, second, third = swarm.add(3)
    swarm.fail_at(peer=2, round=5, phase="collecting", how="kill")
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 6)
    await swarm.start(swarm.restart(third, keep_disk=False))
    await swarm.finish()
    swarm.check_rounds()
    assert len(second.records[-1].members) == 3


@virtual
async def test_a_fresh_majority_follows_the_one_that_trained() -> None:
    swarm = MemorySwarm(rounds=12)
    (veteran,) = swarm.add(1)
    await swarm.start()
    await swarm.until(lambda: veteran.keeper.head[0] == 3)
    fresh = swarm.add(3)
    await swarm.start(*fresh)
    await swarm.finish()
    assert [record.round for record in veteran.records] == list(range(1, 13))
    assert all(peer.records[0].round > 3 for peer in fresh)
    swarm.check_rounds()


@virtual
async def test_a_late_joiner_is_replayed_not_copied_when_it_missed_little() -> None:
    swarm = MemorySwarm(rounds=40, snapshot_every=100)
    first, second, third = swarm.add(3)
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 3)
    swarm.network.cut(third.id)
    served: list[str] = []
    for peer in (first, second):
        serve = peer.keeper.serve

        async def watch(request: dict[str, Any], serve: Source = serve) -> Blob | None:
            served.append(request["what"])
            return await serve(request)

        await BulkServer(peer.host, watch).start()
    third.compute.step_s = 1000.0  # it must not go on alone meanwhile
    await swarm.until(lambda: first.keeper.head[0] >= 8)
    third.compute.step_s = 0.1
    swarm.network.heal()
    await swarm.finish()
    assert "aggregate" in served
    assert "chunk" not in served
    swarm.check_rounds()


@virtual
async def test_who_joins_late_has_a_snapshot_and_the_same_log() -> None:
    swarm = MemorySwarm(rounds=30, snapshot_every=4)
    peers = swarm.add(3)
    (late,) = swarm.add(1)
    await swarm.start(*peers)
    await swarm.until(lambda: peers[0].keeper.head[0] == 18)
    await late.start()
    await swarm.until(lambda: late.keeper.head[0] >= 18)
    assert all(found.round in (0, 16) for found in late.disk.snapshots.all()), "it was given one, and made none before"
    await swarm.finish()
    assert names_of(late, 30) == names_of(peers[0], 30)
    swarm.check_rounds()


@pytest.mark.parametrize("on_disk", [False, True])
@virtual
async def test_when_all_have_died_the_run_goes_on_from_its_newest_record(on_disk: bool, tmp_path: Path) -> None:
    swarm = MemorySwarm(rounds=16, snapshot_every=4)
    for number in range(3):
        disk = Disk(tmp_path / str(number), swarm.manifest, LAYOUT) if on_disk else None
        swarm.peers.append(MemoryPeer(swarm, number, disk))
    first, second, third = swarm.peers
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 5)
    first.kill()
    await swarm.until(lambda: second.keeper.head[0] == 9)
    newest, name = second.keeper.head, second.keeper.state.digest()
    for peer in (second, third):
        peer.kill()
    if on_disk:
        for peer in swarm.peers:
            peer.disk.close()
        for peer in (first, second):
            peer.disk = Disk(tmp_path / str(peer.number), swarm.manifest, LAYOUT)
    again = [swarm.restart(first), swarm.restart(second), swarm.restart(third, keep_disk=False)]
    assert [peer.keeper.head[0] for peer in again] == [5, 9, 0]
    assert (again[1].keeper.head, again[1].keeper.state.digest()) == (newest, name)
    await swarm.start()
    await swarm.finish()
    for peer in again:
        assert peer.disk.log.digest(9) == newest[1]
        assert peer.records[0].round >= 10, "nothing that was committed is done again"
        assert len(peer.records[-1].members) == 3


@virtual
async def test_a_restart_is_at_its_head_without_anybody() -> None:
    swarm = MemorySwarm(rounds=10**6, snapshot_every=4)
    first, second = swarm.add(2)
    await swarm.start()
    await swarm.until(lambda: second.keeper.head[0] == 7)
    first.kill()
    second.kill()
    head, digest = second.keeper.head, second.keeper.state.digest()
    again = swarm.restart(second)
    assert (again.keeper.head, again.keeper.state.digest()) == (head, digest)
    await swarm.start(again)
    await swarm.until(lambda: bool(again.records))
    assert again.records[0].round == 8


@virtual
async def test_who_makes_other_initial_weights_joins_with_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = MemorySwarm(rounds=8)
    peers = swarm.add(2)
    monkeypatch.setattr("p2pllm.testing.swarm.make_state", lambda layout: make_state(seed=9, layout=layout))
    (other,) = swarm.add(1)
    assert not other.keeper.has_state
    await swarm.start(other)
    await asyncio.sleep(30.0)
    assert other.keeper.head[0] == 0 and not other.records, "it has nothing to train on, alone"
    await swarm.start(*peers)
    await swarm.finish()
    swarm.check_rounds()
    assert len(other.records[-1].members) == 3


@virtual
async def test_a_fresh_peer_among_trained_ones_is_followed_by_nobody() -> None:
    """It trains alone at first, since it has not heard of the others yet; its round 1 is not theirs."""
    swarm = MemorySwarm(rounds=10**6)
    *peers, fresh = swarm.add(4)
    await swarm.start(*peers)
    await swarm.until(lambda: peers[0].keeper.head[0] == 4)
    for peer in peers:
        peer.compute.step_s = 1.0
    swarm.network.cut(fresh.id)
    await fresh.start()
    await swarm.until(lambda: fresh.keeper.head[0] == 2)
    fresh.compute.step_s = 1.0
    kept = names_of(peers[0], 4)
    swarm.network.heal()
    await swarm.until(lambda: all(len(peer.records[-1].members) == 4 for peer in swarm.peers))
    for peer in swarm.peers:
        assert names_of(peer, 4) == kept
    assert [head[0] for head in fresh.disk.log.abandoned()][:2] == [1, 2]
    swarm.check_states()
