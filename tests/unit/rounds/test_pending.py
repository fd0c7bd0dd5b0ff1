"""Pending: an update that got into no record is in a later one, whatever the strategy, and in no two."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from histories import changed, claims_of, record_of
from test_strategies import STRATEGIES, made

from p2pllm.averaging import Exchange
from p2pllm.rounds.pending import Pending
from p2pllm.rounds.record import Body, Claim
from p2pllm.rounds.update import Update
from p2pllm.testing import head, virtual


class FakeExchange:
    def __init__(self, keeps: bool = False) -> None:
        self.keeps, self.deliveries = keeps, 0

    def delivered(self) -> None:
        self.deliveries += 1


def pending(keeps: bool = False, fragments: int = 1) -> tuple[Pending, FakeExchange]:
    exchange = FakeExchange(keeps)
    return Pending(cast(Exchange, exchange), fragments), exchange


def update(samples: int, value: float = 1.0) -> Update:
    return Update(samples, 1.0, np.full(5, value, np.float32))


def claimed(round_: int, samples: int = 4) -> Claim:
    (claim,) = claims_of(head(round_, 1), 0, samples=samples)
    return claim


def body(*claims: Claim) -> Body:
    total = sum(claim.samples for claim in claims)
    return Body(
        run=bytes(32), round=4, previous=bytes(32), total=total, members=claims, aggregate=bytes(32), state=bytes(32)
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_what_was_not_packed_is_kept(keeps: bool) -> None:
    kept, _ = pending(keeps)
    lost = update(4, 1.0)
    kept.keep(3, lost, None)
    lost.vector[:] = 7.0  # the worker writes there again
    assert kept.samples(4) == 4
    both = kept.join(4, update(12, 5.0))
    assert both is not None and both.samples == 16
    np.testing.assert_allclose(both.vector, 4.0)
    assert kept.samples(4) == 0 and kept.join(4, None) is None


def test_what_an_exchange_keeps_is_not_kept_twice() -> None:
    kept, _ = pending(keeps=True)
    kept.keep(3, update(4), claimed(3))
    assert kept.join(4, None) is None


def test_a_fragment_waits_for_its_turn_or_for_the_same_round_again() -> None:
    kept, _ = pending(fragments=3)
    kept.keep(4, update(4), claimed(4))
    assert [kept.samples(round_) for round_ in (4, 5, 6, 7)] == [4, 0, 0, 4]
    assert kept.join(5, None) is None
    again = kept.join(4, update(2))
    assert again is not None and again.samples == 6
    kept.keep(4, again, None)
    kept.keep(5, update(1), None)
    assert [kept.samples(round_) for round_ in (6, 7, 8)] == [0, 6, 1]


@pytest.mark.parametrize("keeps", [True, False])
def test_only_a_record_with_what_was_packed_last_ends_it(keeps: bool) -> None:
    kept, exchange = pending(keeps)
    kept.keep(3, update(4), claimed(3))
    record = record_of(body(claimed(3)), 0)
    kept.note(None)
    kept.note(record_of(changed(record.body, members=(claimed(3, samples=5),), total=5), 0))
    assert (exchange.deliveries, kept.samples(3)) == (0, 0 if keeps else 4)
    kept.note(record)
    assert (exchange.deliveries, kept.samples(3)) == (1, 0)
    kept.note(record)
    assert exchange.deliveries == 1


@pytest.mark.parametrize("keeps", [True, False])
def test_what_came_after_it_was_packed_is_kept_when_that_turns_out_to_be_committed(keeps: bool) -> None:
    kept, exchange = pending(keeps)
    kept.keep(3, update(4), claimed(3))
    joined = kept.join(3, update(2))
    assert joined is not None
    kept.keep(3, joined, None)
    kept.note(record_of(body(claimed(3)), 0))
    assert kept.samples(3) == (2 if keeps else 6)
    assert exchange.deliveries == keeps


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

    late.compute.finish = slow
    in_exchange, keep = list[Claim](), late.loop._pending.keep

    def seen(round_: int, update: Update, claim: Claim | None) -> None:
        if claim is not None and late.exchange.keeps:  # what it packed it sends later, without the samples
            in_exchange.append(claim)
        keep(round_, update, claim)

    late.loop._pending.keep = seen
    await swarm.start()
    await swarm.finish()
    assert len(missed) >= 3
    recorded = {
        claim
        for record in peers[0].disk.log.records()
        for claim in (record.body.members if record else ())
        if claim.peer == late.id
    }
    kept = sum(update.samples for update in late.loop._pending._kept.values())
    assert sum(finished) == kept + sum(claim.samples for claim in recorded.union(in_exchange))
