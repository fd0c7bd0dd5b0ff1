"""StateKeeper: forward by replay or adoption, and never to anything that was not proved before."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from p2pllm.errors import StateError
from p2pllm.network.bulk import Blob, BulkServer
from p2pllm.rounds import keeper as keeper_module
from p2pllm.rounds.keeper import StateKeeper, aggregate_digest
from p2pllm.state import AdamW
from p2pllm.testing import LAYOUT, MemoryNetwork, make_manifest, make_state, virtual


def gradient(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(LAYOUT.size).astype(np.float32)


async def make_keepers(count: int, state=make_state) -> list[StateKeeper]:
    network, manifest = MemoryNetwork(), make_manifest()
    keepers = []
    for number in range(count):
        host = network.host(number)
        keeper = StateKeeper(state(), AdamW(manifest.optimizer, 100, LAYOUT), host)
        await BulkServer(host, lambda request, keeper=keeper: keeper.serve(request)).start()
        keepers.append(keeper)
    return keepers


def name(keeper: StateKeeper) -> str:
    return keeper._transport.peer_id


def frozen(keeper: StateKeeper) -> tuple[Any, ...]:
    return keeper.head, keeper.state.digest(), keeper.state.params.tobytes()


@virtual
async def test_the_head_is_what_the_state_is():
    (keeper,) = await make_keepers(1)
    assert keeper.head == (0, bytes.fromhex(keeper.state.digest()))
    seconds = await keeper.apply(gradient(1))
    assert keeper.head == (1, bytes.fromhex(keeper.state.digest()))
    assert seconds.keys() == {"outer_step", "digest"}


@virtual
async def test_an_aggregate_that_does_not_fit_changes_nothing():
    (keeper,) = await make_keepers(1)
    before = frozen(keeper)
    with pytest.raises(StateError):
        await keeper.apply(np.full(LAYOUT.size, np.nan, np.float32))
    assert frozen(keeper) == before


@pytest.mark.parametrize("rounds", [1, 3, 64, 65])
@virtual
async def test_missed_rounds_are_replayed_or_the_state_is_adopted(rounds: int):
    ahead, behind = await make_keepers(2)
    memory = behind.state.params
    for number in range(rounds):
        await ahead.apply(gradient(number))
    assert await behind.follow(ahead.head, [name(ahead)])
    assert frozen(behind) == frozen(ahead)
    assert behind.state.params is memory
    assert bool(behind._applied) == (rounds <= 64)  # who replayed can serve the same rounds
    assert not np.shares_memory(behind.state.m, ahead.state.m)


@virtual
async def test_a_diverged_state_is_adopted():
    good, bad = await make_keepers(2)
    await good.apply(gradient(1))
    await bad.apply(gradient(2))
    assert await bad.follow(good.head, [name(good)])
    assert frozen(bad) == frozen(good)


@virtual
async def test_a_donor_that_has_moved_on_serves_what_it_has():
    donor, behind = await make_keepers(2, lambda: make_state(200))
    target = (500, b"x" * 32)
    donor.head = (501, donor.head[1])
    donor.state.round = 501
    donor.head = (501, bytes.fromhex(donor.state.digest()))
    assert await behind.follow(target, [name(donor)])
    assert behind.head == donor.head


def lying(blob: dict[str, Any], buffers: list[Any]) -> Any:
    async def serve(request: dict[str, Any]) -> Blob | None:
        return Blob(dict(blob), buffers)

    return serve


def payload(state) -> list[bytes]:
    return [bytes(view) for view in state.payload()]


OTHER = make_state(5, seed=9)
NAN = make_state(5, seed=9)
NAN.params[3] = np.nan
LIES = {
    "nothing": ({}, []),
    "short": ({"state": OTHER.header(), "digest": bytes.fromhex(OTHER.digest())}, payload(OTHER)[:2]),
    "header": ({"state": {"round": "5"}, "digest": b""}, payload(OTHER)),
    "no header": ({"state": 7}, payload(OTHER)),
    "digest": ({"state": OTHER.header(), "digest": bytes(32)}, payload(OTHER)),
    "other state": ({"state": OTHER.header(), "digest": bytes.fromhex(OTHER.digest())}, payload(OTHER)),
    "not finite": ({"state": NAN.header(), "digest": bytes.fromhex(NAN.digest())}, payload(NAN)),
    "bad aggregate": ({"next": bytes(32)}, [gradient(1).data]),
    "nan aggregate": ({"next": bytes(32)}, [np.full(LAYOUT.size, np.nan, np.float32).data]),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("round_", [5, 6])
@virtual
async def test_a_lie_changes_nothing_and_is_remembered(lie: str, round_: int):
    liar, keeper = await make_keepers(2, lambda: make_state(4))
    await BulkServer(liar._transport, lying(*LIES[lie])).start()
    await keeper.apply(gradient(3))
    before = frozen(keeper)
    assert not await keeper.follow((round_, b"y" * 32), [name(liar)])
    assert frozen(keeper) == before
    assert keeper.refuted == {name(liar)}


@virtual
async def test_a_replay_that_ends_elsewhere_is_thrown_away():
    liar, keeper = await make_keepers(2)
    await liar.apply(gradient(1))
    await liar.apply(gradient(2))
    before = frozen(keeper)
    assert not await keeper._replay(name(liar), (2, b"y" * 32))
    assert frozen(keeper) == before
    assert not keeper._applied


@virtual
async def test_a_donor_that_fails_is_not_refuted_and_the_next_one_is_asked():
    gone, good, keeper = await make_keepers(3)
    await good.apply(gradient(1))
    gone._transport.kill()
    assert await keeper.follow(good.head, [name(gone), name(good)])
    assert not keeper.refuted


@virtual
async def test_a_missed_aggregate_comes_from_whoever_has_it():
    liar, proposing, applied, keeper = await make_keepers(4)
    wanted = gradient(1)
    digest = aggregate_digest(wanted)
    await BulkServer(liar._transport, lying({}, [gradient(2).data])).start()
    assert await keeper.fetch_aggregate([name(liar), name(proposing)], digest) is None
    proposing.propose(digest, wanted)
    found = await keeper.fetch_aggregate([name(liar), name(proposing)], digest)
    np.testing.assert_array_equal(found, wanted)
    await applied.apply(wanted)
    assert await keeper.fetch_aggregate([name(applied)], digest) is not None


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"what": 1},
        {"what": "state of affairs"},
        {"what": "proposed", "digest": [1]},
        {"what": "applied", "round": "x", "digest": {}},
        {"what": "applied"},
    ],
)
@virtual
async def test_strange_requests_get_nothing(request_: dict[str, Any]):
    (keeper,) = await make_keepers(1)
    await keeper.apply(gradient(1))
    assert await keeper.serve(request_) is None


@virtual
async def test_joiners_of_a_round_share_one_copy_which_later_rounds_do_not_touch():
    (keeper,) = await make_keepers(1)
    first, second = await keeper.serve({"what": "state"}), await keeper.serve({"what": "state"})
    assert first is second
    before = [bytes(buffer) for buffer in first.buffers]
    await keeper.apply(gradient(1))
    assert [bytes(buffer) for buffer in first.buffers] == before
    assert await keeper.serve({"what": "state"}) is not first


@virtual
async def test_kept_aggregates_are_bounded_by_rounds_and_bytes(monkeypatch=None):
    (keeper,) = await make_keepers(1)
    for number in range(70):
        await keeper.apply(gradient(number))
    assert len(keeper._applied) == 64
    step = SimpleNamespace(aggregate=SimpleNamespace(nbytes=keeper_module.KEPT_BYTES // 3))
    keeper._keep((100, b""), step)
    assert len(keeper._applied) == 3
    keeper._keep((101, b""), SimpleNamespace(aggregate=SimpleNamespace(nbytes=keeper_module.KEPT_BYTES * 2)))
    assert list(keeper._applied) == [(101, b"")]


def test_who_is_cancelled_in_a_step_ends_it_first():
    """With real threads: half a step would be saved as a state."""

    async def check() -> None:
        (keeper,) = await make_keepers(1)
        step = asyncio.create_task(keeper.apply(gradient(1)))
        await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert keeper.head == (1, bytes.fromhex(keeper.state.digest()))

    asyncio.run(check())
