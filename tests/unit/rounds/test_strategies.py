"""Whole swarms in memory with each strategy: one state, replay, joining and failures work the same for all."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from p2pllm.rounds.update import Update
from p2pllm.state import Layout
from p2pllm.testing import MemoryPeer, MemorySwarm, virtual
from p2pllm.testing.swarm import Parts

WIDE = Layout.of([("embedding", (130, 70)), ("matrix", (64, 64)), ("gain", (70,))])
UNEVEN = Layout.of([("matrix", (31, 20)), ("gain", (5,))])
"""Its three fragments differ in size."""

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "diloco"},
    {"strategy": "diloco", "overlap": True},
    {"strategy": "diloco", "overlap": True, "fragments": 3},
    {"strategy": "sparse_loco"},
    {"strategy": "sparse_loco", "overlap": True},
]


def made(**section: Any) -> MemorySwarm:
    return MemorySwarm(parts=Parts(layout=WIDE), **{"rounds": 8, "snapshot_every": 3, **section})


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@virtual
async def test_all_hold_the_same_state(strategy: dict[str, Any]) -> None:
    swarm = made(**strategy)
    peers = swarm.add(4)
    before = peers[0].keeper.state.params.copy()
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    assert [len(record.members) for record in peers[0].records[2:]] == [4] * 6
    assert not np.array_equal(peers[0].keeper.state.params, before)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@virtual
async def test_a_joiner_replays_what_it_missed(strategy: dict[str, Any]) -> None:
    swarm = made(**strategy)
    first, second, late = swarm.add(3)
    await swarm.start(first, second)
    await swarm.until(lambda: first.keeper.head[0] == 5)
    await late.start()
    await swarm.finish()
    swarm.check_rounds()
    assert len(second.records[-1].members) == 3


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("phase", ["collecting", "exchange", "vote"])
@virtual
async def test_a_death_costs_a_round_nothing_but_time(strategy: dict[str, Any], phase: Any) -> None:
    swarm = made(**strategy)
    first, *_, third = swarm.add(3)
    swarm.fail_at(peer=2, round=3, phase=phase, how="kill")
    await swarm.start()
    await swarm.until(lambda: first.keeper.head[0] == 5)
    await swarm.start(swarm.restart(third))
    await swarm.finish()
    swarm.check_rounds()


@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if each.get("overlap")], ids=str)
@virtual
async def test_work_that_went_on_lands_on_the_state_of_its_round(strategy: dict[str, Any]) -> None:
    """Also on that of a later one, where the swarm has gone on without us meanwhile."""
    swarm = MemorySwarm(parts=Parts(layout=UNEVEN), **{"rounds": 12, "snapshot_every": 3, **strategy})
    peers = swarm.add(4)
    slow = peers[3]
    compute, finish = slow.compute, slow.compute.finish
    stood_on: list[bool] = []

    async def watched(go_on: bool = False) -> Update | None:
        stood_on.append(np.array_equal(compute.base, slow.keeper.state.params))
        at = slow.keeper.head[0]
        update = await finish(go_on)
        if at == 5:
            assert await slow.view.wait_until(lambda: peers[0].keeper.head[0] > at + 1, 60.0)
        return cast(Update | None, update)

    compute.finish = watched
    await swarm.start()
    await swarm.finish()
    assert all(stood_on)
    assert len(compute.landed) >= 6 and compute.landed == sorted(set(compute.landed))
    assert 6 not in compute.landed, "what it had begun for that round landed on a later one"
    assert max(compute.landed) > 7, "and it went on"
    swarm.check_rounds()


@virtual
async def test_fragments_take_turns() -> None:
    swarm = made(strategy="diloco", overlap=True, fragments=3)
    peers = swarm.add(3)
    first = peers[0].keeper
    await swarm.start()
    size, sent = WIDE.size, []
    for round_ in range(4):
        before = first.state.params.copy()
        await swarm.until(lambda after=round_ + 1: first.head[0] == after)
        moved = np.flatnonzero(first.state.params != before)
        assert size * (round_ % 3) // 3 <= moved.min() and moved.max() < size * (round_ % 3 + 1) // 3
        record = peers[0].disk.log.record(round_ + 1)
        assert record is not None
        sent.append(peers[0].disk.aggregates.size(record.body.aggregate))
    assert sum(sent[:3]) == WIDE.nbytes and sent[3] == sent[0]


def damages_what_it_packs(liar: MemoryPeer, round_: int) -> None:
    """From the round after `round_` on."""
    pack = liar.exchange.pack

    def lie(update: np.ndarray) -> bytes:
        payload = bytearray(pack(update))
        payload[0] ^= 0x40
        return bytes(payload)

    liar.at("collecting", round_, lambda: setattr(liar.exchange, "pack", lie))


@pytest.mark.parametrize("count", [1, 2])
@virtual
async def test_updates_that_are_none_count_for_nobody_and_their_senders_are_named(count: int) -> None:
    swarm = made(strategy="sparse_loco", rounds=6)
    others, liars = swarm.add(4), swarm.add(count)
    for liar in liars:
        damages_what_it_packs(liar, 2)
    await swarm.start()
    await swarm.until(lambda: all(peer.keeper.head[0] == 6 for peer in others))
    for peer in others:
        assert [len(record.members) for record in peer.records[3:]] == [4, 4, 4]
        for failure in peer.records[2].failures:
            assert all(f"The update of {liar.id} is refused" in failure for liar in liars)
        assert peer.records[2].failures


@virtual
async def test_aggregates_of_sparse_updates_are_small() -> None:
    swarm = made(strategy="sparse_loco")
    peers = swarm.add(3)
    await swarm.start()
    await swarm.finish()
    record = peers[0].disk.log.record(8)
    assert record is not None
    size = peers[0].disk.aggregates.size(record.body.aggregate)
    assert 0 < size < 3 * WIDE.nbytes / 32 / 4, "a hundredth of the dense one, but for headers that count here"


@virtual
async def test_what_compression_leaves_out_is_sent_later() -> None:
    """Every peer's update is the same each round, so the state must move by it, and not by its largest parts alone."""
    swarm = made(strategy="sparse_loco", rounds=120, samples=4)
    (peer,) = swarm.add(1)
    update = np.linspace(1.0, 3.0, WIDE.size, dtype=np.float32)
    peer.compute._gradient = update
    before = peer.keeper.state.params.copy()

    async def keep_gradient(round_number: int, begin: Any = peer.compute.begin) -> None:
        await begin(round_number)
        peer.compute._gradient = update

    peer.compute.begin = keep_gradient
    await swarm.start()
    await swarm.finish(3000)
    moved = before - peer.keeper.state.params
    assert (moved > 0).mean() > 0.6, "one round moves one of 64"
