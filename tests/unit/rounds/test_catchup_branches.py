"""Another branch: it is followed if it is better and can be had, else log and state stay as they were."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from histories import EVERY, Node, commit, frozen, make_nodes, saved, train

from p2pllm.errors import StateError
from p2pllm.network.bulk import Blob
from p2pllm.rounds.record import Checkpoint
from p2pllm.testing import identity_number, virtual


async def forked(light: Node, heavy: Node, rounds: int = 3) -> None:
    """Both go on alone from a common log of `rounds`; the light one has more rounds, and fewer samples."""
    await train(light, heavy, rounds=rounds)
    await train(light, rounds=4, samples=1)
    await train(heavy, rounds=2, samples=100)
    await saved(light, heavy)


@pytest.mark.parametrize("rounds", [0, 1, 3, EVERY, EVERY + 3])
@virtual
async def test_the_lighter_branch_is_left_and_told_of(rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    light, heavy = await make_nodes(2)
    await forked(light, heavy, rounds)
    before = frozen(heavy)
    assert not await heavy.follow(light), "nobody moves to a branch with less behind it"
    assert frozen(heavy) == before
    left = [light.disk.head_at(rounds + number) for number in range(1, 5)]
    with caplog.at_level(logging.WARNING):
        assert await light.follow(heavy)
    assert frozen(light) == before
    assert set(light.disk.log.abandoned()) == set(left)
    assert f"rounds {rounds + 1} to {rounds + 4} of ours are abandoned" in caplog.text


@virtual
async def test_a_checkpoint_makes_the_lighter_branch_win() -> None:
    light, heavy = await make_nodes(2)
    await forked(light, heavy)
    record = light.disk.log.record(4)
    assert record is not None
    assert await light.keeper.anchor(Checkpoint.sign(identity_number(0), light.disk.run_id, record.head))
    assert light.keeper.branch.rank > heavy.keeper.branch.rank
    assert not await light.follow(heavy)
    assert await heavy.follow(light)
    assert frozen(heavy) == frozen(light)
    assert heavy.keeper.branch.anchor == 4


@virtual
async def test_a_checkpoint_that_its_donor_brings_keeps_us_where_we_are() -> None:
    """The donor did not know which branch the checkpoint is for."""
    light, heavy = await make_nodes(2)
    await forked(light, heavy)
    record = light.disk.log.record(4)
    assert record is not None
    await heavy.keeper.anchor(Checkpoint.sign(identity_number(0), light.disk.run_id, record.head))
    assert heavy.keeper.branch.anchor == 0
    before = light.keeper.state.digest()
    assert not await light.follow(heavy)
    assert light.keeper.state.digest() == before
    assert light.keeper.branch.anchor == 4


@virtual
async def test_if_the_state_cannot_be_had_the_log_stays_where_it_was() -> None:
    light, heavy = await make_nodes(2)
    await forked(light, heavy)

    async def only_the_log(request: dict[str, Any]) -> Blob | None:
        return await heavy.keeper.serve(request) if request["what"] == "log" else None

    heavy.answer = only_the_log
    before = frozen(light)
    assert not await light.follow(heavy)
    assert frozen(light) == before
    await commit(light)
    assert light.keeper.refuted == set(), "it may be a donor whose disk has lost something"


@pytest.mark.parametrize("then", ["follows again", "goes on alone"])
@virtual
async def test_a_disk_that_fails_on_the_way_to_another_branch_costs_nothing(
    then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has moved, the aggregates do not fit, and the log cannot be moved back either."""
    light, heavy = await make_nodes(2)
    await forked(light, heavy)
    before, switch = frozen(light), light.disk.log.switch
    calls: list[int] = []

    def put(*_: object) -> None:
        raise StateError("The disk is full.")

    def switch_once(*arguments: Any) -> Any:
        calls.append(1)
        return switch(*arguments) if len(calls) == 1 else put()

    with monkeypatch.context() as patched:
        patched.setattr(light.disk.aggregates, "put", put)
        patched.setattr(light.disk.log, "switch", switch_once)
        with pytest.raises(StateError, match="The disk is full"):
            await light.follow(heavy)
    assert len(calls) == 2
    assert frozen(light) == before
    if then == "follows again":
        assert await light.follow(heavy)
        assert frozen(light) == frozen(heavy)
    else:  # whom it wanted to follow is gone
        record = await commit(light)
        assert record.body.base == before[0].head
        assert (light.head, light.disk.log.branch) == (record.head, light.keeper.branch)
