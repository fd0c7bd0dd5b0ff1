"""Pending: an update that got into no record is in a later one, whatever the strategy, and in no two."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from histories import claims_of, record_of
from test_strategies import STRATEGIES, made

from p2pllm.averaging import Exchange
from p2pllm.errors import DiskError
from p2pllm.rounds.pending import Pending
from p2pllm.rounds.record import Body, Claim, Head, Record
from p2pllm.rounds.update import Packed, Update
from p2pllm.testing import MemoryPeer, head, virtual

HERE, THERE = head(3, 1), head(4, 1)


class FakeExchange:
    def __init__(self, keeps: bool = False) -> None:
        self.keeps, self.deliveries = keeps, 0

    def delivered(self) -> None:
        self.deliveries += 1


class Log:
    """One record at most."""

    record: Record | None = None

    def __call__(self, round_: int) -> Record | None:
        return self.record if self.record is not None and self.record.body.round == round_ else None


def pending(keeps: bool = False, fragments: int = 1) -> tuple[Pending, FakeExchange, Log]:
    exchange, log = FakeExchange(keeps), Log()
    return Pending(cast(Exchange, exchange), fragments, log), exchange, log


def update(samples: int, value: float = 1.0) -> Update:
    return Update(samples, 1.0, np.full(5, value, np.float32))


async def offer(to: Pending, where: Head, fresh: Update | None) -> Packed | None:
    async def pack(update: Update) -> Packed:
        return Packed(where, claimed(where, update.samples), update.vector, update)

    return await to.offer(where, fresh, pack)


def claimed(where: Head, samples: int) -> Claim:
    (claim,) = claims_of(where, 0, samples=samples)
    return claim


def round_with(*claims: Claim) -> Record:
    """The round after HERE."""
    total = sum(claim.samples for claim in claims)
    return record_of(
        Body(
            run=bytes(32), round=4, previous=HERE[1], total=total, members=claims, aggregate=bytes(32), state=bytes(32)
        ),
        0,
    )


@pytest.mark.parametrize("keeps", [True, False])
@virtual
async def test_what_was_not_packed_goes_into_the_next_round(keeps: bool) -> None:
    kept, _, _ = pending(keeps)
    lost = update(4, 1.0)
    kept.keep(head(2, 1), lost)
    lost.vector[:] = 7.0  # the worker writes there again
    assert kept.samples(HERE, 12) == 16
    both = await offer(kept, HERE, update(12, 5.0))
    assert both is not None and both.update.samples == 16
    np.testing.assert_allclose(both.update.vector, 4.0)


@pytest.mark.parametrize("keeps", [True, False])
@virtual
async def test_what_was_packed_for_a_head_is_offered_there_until_that_moves(keeps: bool) -> None:
    """Others may hold it in a proposal. What came since counts in the next round, and in no other."""
    kept, exchange, log = pending(keeps)
    first = update(4, 1.0)
    packed = await offer(kept, HERE, first)
    kept.settle(HERE)
    first.vector[:] = 7.0
    again = await offer(kept, HERE, update(2, 2.0))
    assert packed is not None and again is not None and again.claim == packed.claim
    assert kept.samples(HERE, 8) == 4, "what is new does not go into this round"
    np.testing.assert_allclose(again.update.vector, 1.0)
    np.testing.assert_allclose(cast(np.ndarray, again.payload), 1.0)
    log.record = round_with(packed.claim)
    kept.settle(log.record.head)
    kept.settle(log.record.head)
    assert (exchange.deliveries, kept.samples(log.record.head, 0)) == (1, 2)


@pytest.mark.parametrize("keeps", [True, False])
@virtual
async def test_once_the_head_has_moved_it_is_packed_anew(keeps: bool) -> None:
    kept, exchange, log = pending(keeps)
    assert await offer(kept, HERE, update(4)) is not None
    log.record = round_with(claimed(HERE, 5))  # ours, but another one, as of a former life
    kept.settle(log.record.head)
    again = await offer(kept, log.record.head, update(2))
    assert again is not None and again.update.samples == (2 if keeps else 6), "what it packed it keeps, without samples"
    assert exchange.deliveries == 0


@virtual
async def test_who_was_taken_back_by_damage_still_finds_out_that_it_was_delivered() -> None:
    kept, exchange, log = pending()
    packed = await offer(kept, HERE, update(4))
    kept.settle(head(1, 1))
    assert packed is not None
    log.record = round_with(packed.claim)
    kept.settle(head(9, 1))
    assert (exchange.deliveries, kept.samples(head(9, 1), 0)) == (1, 0)


@virtual
async def test_a_fragment_waits_for_its_turn() -> None:
    kept, _, _ = pending(fragments=3)
    assert await offer(kept, head(4, 1), update(4)) is not None
    kept.settle(head(5, 1))
    assert [kept.samples(head(round_, 1), 0) for round_ in (5, 6, 7)] == [0, 0, 4]
    assert await offer(kept, head(5, 1), None) is None
    kept.keep(head(5, 1), update(1))
    again = await offer(kept, head(7, 1), update(2))
    assert again is not None and again.update.samples == 6
    assert [kept.samples(head(round_, 1), 0) for round_ in (8, 9)] == [1, 0]


@pytest.mark.parametrize("strategy", [{"strategy": "sync"}, *STRATEGIES], ids=str)
@virtual
async def test_nothing_is_lost_when_the_swarm_goes_on_while_an_update_is_finished(strategy: dict[str, Any]) -> None:
    swarm = made(**{**strategy, "rounds": 14})
    peers = swarm.add(4)
    *_, late = peers
    finish, finished = late.compute.finish, list[int]()
    missed = set[int]()

    async def slow(go_on: bool = False) -> Update | None:
        at, update = late.keeper.head[0], await finish(go_on)
        if 3 <= at <= 9 and at not in missed:
            missed.add(at)
            assert await late.view.wait_until(late.loop._is_behind, 60.0)
        finished.append(update.samples if update else 0)
        return cast(Update | None, update)

    pack, packed = late.loop._runner.pack, list[int]()

    async def seen(update: Update) -> Packed:
        packed.append(update.samples)
        return await pack(update)

    late.compute.finish, late.loop._runner.pack = slow, seen  # type: ignore[method-assign]
    await swarm.start()
    await swarm.finish()
    assert len(missed) >= 3
    left = left_of(late)
    if late.exchange.keeps:  # what it packed it sends later, without the samples
        assert sum(finished) == left + sum(packed)
    else:
        assert sum(finished) == left + in_the_log(late)


@pytest.mark.parametrize("strategy", [{"strategy": "sync"}, *STRATEGIES], ids=str)
@virtual
async def test_what_others_hold_of_a_peer_whose_disk_failed_counts_once(strategy: dict[str, Any]) -> None:
    """The other one votes for a record with its update, which finds no majority, and is settled when it is back."""
    swarm = made(**{**strategy, "rounds": 6})
    poor, other = swarm.add(2)
    finish, finished = poor.compute.finish, list[int]()
    propose, failed = poor.keeper.propose, list[int]()

    async def counted(go_on: bool = False) -> Update | None:
        update = cast(Update | None, await finish(go_on))
        finished.append(update.samples if update else 0)
        return update

    async def full_once(claims: tuple[Claim, ...], aggregate: Any) -> Body:
        at = poor.keeper.head[0]
        if 2 <= at <= 4 and at not in failed and len(claims) == 2:
            failed.append(at)
            raise DiskError("The disk is full.")
        return await propose(claims, aggregate)

    poor.compute.finish, poor.keeper.propose = counted, full_once  # type: ignore[method-assign]
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    assert failed == [2, 3, 4]
    assert sum(finished) == left_of(poor) + in_the_log(poor)
    claims = [claim for record in other.disk.log.records() if record for claim in record.body.members]
    assert len({claim.update for claim in claims if claim.peer == poor.id}) == 6


def in_the_log(peer: MemoryPeer) -> int:
    """Samples of a peer in committed rounds."""
    records = [record for record in peer.disk.log.records() if record]
    return sum(claim.samples for record in records for claim in record.body.members if claim.peer == peer.id)


def left_of(peer: MemoryPeer) -> int:
    """Samples that are pending, of all fragments."""
    fragments = range(peer.swarm.manifest.round.fragments)
    return sum(peer.loop._pending.samples((peer.keeper.head[0] + at, bytes(32)), 0) for at in fragments)
