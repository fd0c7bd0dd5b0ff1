"""StateKeeper: a round is proposed beside the state, is on the disk before it counts, and is never half taken."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histories import EVERY, Node, changed, claims_of, commit, frozen, gradient, make_nodes, record_of, saved, train

from p2pllm.errors import DiskError, NoRoomError, StateError
from p2pllm.rounds.fetching import Refuted
from p2pllm.rounds.keeper import MAX_HELD
from p2pllm.rounds.record import Body, Checkpoint, genesis
from p2pllm.state import SharedState, Snapshot
from p2pllm.state.chunks import digest_of
from p2pllm.testing import LAYOUT, identity_number, virtual


async def fetch_proposal(node: Node, holders: list[Node], body: Body, timeout: float = 60.0) -> Body | None:
    return await node.keeper.fetch_proposal([holder.id for holder in holders], body.digest, timeout)


def state_after(node: Node) -> bytes:
    return bytes.fromhex(node.keeper.state.digest())


@virtual
async def test_a_run_begins_at_its_genesis_with_the_state_of_its_manifest() -> None:
    (node,) = await make_nodes(1)
    assert node.head == genesis(node.disk.run_id)
    assert node.keeper.has_state
    assert [(found.round, found.state) for found in node.disk.on_branch()] == [(0, node.disk.initial_state)]


@virtual
async def test_a_proposal_says_what_the_round_would_be_and_moves_nothing() -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=2)
    before = frozen(node)
    claims = claims_of(node.head, 0, 1, samples=6)
    body = await node.keeper.propose(claims, gradient(1))
    assert frozen(node) == before
    assert (body.base, body.members) == (node.head, claims)
    assert body.total == node.keeper.branch.total + 12
    assert body.aggregate == digest_of(gradient(1).data.cast("B"))
    assert node.keeper.holding == body.digest
    assert node.disk.aggregates.has(body.aggregate), "whoever votes for it must be able to give it"
    await node.keeper.commit(record_of(body, 0))
    assert (node.head, state_after(node)) == (body.head, body.state)
    assert node.keeper.branch.total == body.total


@virtual
async def test_a_committed_round_is_in_the_log_and_nothing_is_held_any_more() -> None:
    (node,) = await make_nodes(1)
    memory = node.keeper.state.params
    record = await commit(node)
    assert node.disk.log.record(1) == record
    assert node.keeper.state.params is memory, "the worker has mapped it"
    assert node.keeper.holding == b""
    assert node.keeper.seconds.keys() == {"outer_step", "digest", "store", "log"}


@virtual
async def test_peers_that_take_the_same_rounds_hold_the_same_bits() -> None:
    first, second = await make_nodes(2)
    await train(first, second, rounds=5)
    assert frozen(first) == frozen(second)
    assert not np.shares_memory(first.keeper.state.moments["m"], second.keeper.state.moments["m"])


@pytest.mark.parametrize("vector", [np.full(LAYOUT.size, np.nan, np.float32), np.zeros(3, np.float32)])
@virtual
async def test_an_aggregate_that_does_not_fit_changes_nothing(vector: np.ndarray) -> None:
    (node,) = await make_nodes(1)
    before = frozen(node)
    with pytest.raises(StateError):
        await node.keeper.propose(claims_of(node.head, 0), vector)
    assert frozen(node) == before
    assert node.keeper.holding == b""


@virtual
async def test_of_several_proposals_any_may_be_committed() -> None:
    (node,) = await make_nodes(1)
    claims = claims_of(node.head, 0)
    bodies = [await node.keeper.propose(claims, gradient(seed)) for seed in range(3)]
    await node.keeper.commit(record_of(bodies[0], 0))  # the newest one lies in the spare state
    assert (node.head, state_after(node)) == (bodies[0].head, bodies[0].state)


@virtual
async def test_proposals_that_are_held_are_bounded() -> None:
    (node,) = await make_nodes(1)
    for seed in range(MAX_HELD + 3):
        body = await node.keeper.propose(claims_of(node.head, 0), gradient(seed))
    assert len(node.keeper._held) == MAX_HELD
    assert node.keeper.holding == body.digest


@pytest.mark.parametrize("part", ["aggregates.put", "log.append"])
@virtual
async def test_a_disk_that_fails_leaves_the_round_untaken(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=2)
    before = frozen(node)

    def full(*_: object) -> None:
        raise StateError("The disk is full.")

    owner, name = part.split(".")
    with monkeypatch.context() as patched:
        patched.setattr(getattr(node.disk, owner), name, full)
        with pytest.raises(StateError, match="The disk is full"):
            await commit(node)
    assert frozen(node) == before
    await commit(node)
    assert node.head[0] == 3


@virtual
async def test_a_record_that_does_not_follow_is_not_taken() -> None:
    first, second = await make_nodes(2)
    record = await commit(first)
    await commit(second, seed=2)
    before = frozen(second)
    with pytest.raises((StateError, ValueError)):
        await second.keeper.commit(record)
    assert frozen(second) == before


# -- what others propose ---------------------------------------------------------------------------------------------


@virtual
async def test_a_proposal_is_fetched_by_digest_and_taken_over() -> None:
    liar, holder, member = await make_nodes(3)
    body = await holder.keeper.propose(claims_of(holder.head, 0, 1), gradient(1))
    liar_body = await liar.keeper.propose(claims_of(liar.head, 0), gradient(2))

    async def lie(request: dict[str, Any]) -> Any:
        return await liar.keeper.serve(request | {"digest": liar_body.digest})

    liar.answer = lie
    with pytest.raises(Refuted, match=f"{liar.id} is refused: none of them gives it"):
        await fetch_proposal(member, [liar], body)
    assert await fetch_proposal(member, [liar, holder], body) == body
    assert member.keeper.holding == body.digest
    await member.keeper.commit(record_of(body, 0, 1))
    assert state_after(member) == body.state


@virtual
async def test_what_we_proposed_before_is_not_fetched() -> None:
    (node,) = await make_nodes(1)
    first = await node.keeper.propose(claims_of(node.head, 0), gradient(1))
    await node.keeper.propose(claims_of(node.head, 0), gradient(2))
    assert await fetch_proposal(node, [], first) == first
    assert node.keeper.holding == first.digest


@virtual
async def test_a_proposal_with_claims_that_nobody_signed_is_refused() -> None:
    liar, member = await make_nodes(2)
    forged = claims_of(liar.head, 0)[0].model_copy(update={"samples": 10**9})
    body = await liar.keeper.propose((forged,), gradient(1))
    with pytest.raises(Refuted, match="did not sign"):
        await fetch_proposal(member, [liar], body)
    assert member.keeper.holding == b""


@virtual
async def test_a_proposal_for_another_round_is_refused() -> None:
    ahead, member = await make_nodes(2)
    await commit(ahead)
    body = await ahead.keeper.propose(claims_of(ahead.head, 0), gradient(1))
    with pytest.raises(Refuted, match="none of them gives it"):
        await fetch_proposal(member, [ahead], body)


@virtual
async def test_a_proposal_with_an_aggregate_that_is_none_speaks_against_who_holds_it() -> None:
    liar, member = await make_nodes(2)
    junk = b"junk" * 10
    liar.disk.aggregates.put(digest_of(junk), junk)
    right = await liar.keeper.propose(claims_of(liar.head, 0), gradient(1))
    wrong = changed(right, aggregate=digest_of(junk))
    liar.keeper._held[wrong.digest] = wrong
    with pytest.raises(Refuted, match=f"{liar.id} is refused: The aggregate of round 1 is of no use"):
        await fetch_proposal(member, [liar], wrong)
    assert member.keeper.holding == b""


@virtual
async def test_a_full_disk_speaks_against_nobody_who_gives_a_proposal() -> None:
    holder, member = await make_nodes(2)
    body = await holder.keeper.propose(claims_of(holder.head, 0), gradient(1))

    def full(digest: bytes, data: Any) -> None:
        raise NoRoomError("The disk is full.")

    member.disk.aggregates.put = full  # type: ignore[method-assign]
    with pytest.raises(DiskError, match="full"):
        await fetch_proposal(member, [holder], body)


@virtual
async def test_a_proposal_that_does_not_come_in_time_is_refused() -> None:
    holder, member = await make_nodes(2)
    body = await holder.keeper.propose(claims_of(holder.head, 0), gradient(1))

    async def never(request: dict[str, Any]) -> Any:
        await asyncio.sleep(9.0)

    holder.answer = never
    with pytest.raises(Refuted, match="none of them gives it"):
        await fetch_proposal(member, [holder], body, timeout=2.0)


@pytest.mark.parametrize("what", ["proposal", "aggregate"])
@virtual
async def test_one_holder_that_is_silent_keeps_nobody_from_the_others(what: str) -> None:
    silent, other, member = await make_nodes(3)
    for holder in (silent, other):
        body = await holder.keeper.propose(claims_of(holder.head, 0), gradient(1))

    async def stall(request: dict[str, Any]) -> Any:
        if request["what"] == what:
            await asyncio.sleep(9.0)
        return await silent.keeper.serve(request)

    silent.answer = stall
    assert await fetch_proposal(member, [silent, other], body, timeout=2.0) == body


@virtual
async def test_a_round_is_taken_though_the_disk_gives_no_list_for_its_snapshot() -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=EVERY - 1)

    def broken() -> set[bytes]:
        raise StateError("The folder cannot be read.")

    node.disk.aggregates.digests = broken  # type: ignore[method-assign]
    record = await commit(node)
    assert node.head == record.head


@virtual
async def test_a_snapshot_that_is_written_drops_no_aggregate_that_is_voted_on() -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=EVERY - 1)
    save, next_one = node.disk.snapshots.save, gradient(99).data.cast("B")

    def slow(state: SharedState, record: bytes) -> Snapshot:
        node.disk.aggregates.put(digest_of(next_one), next_one)  # while the snapshot is written
        return save(state, record)

    node.disk.snapshots.save = slow  # type: ignore[method-assign]
    await train(node, rounds=1)
    await saved(node)
    assert node.disk.on_branch()[0].round == EVERY
    assert node.disk.aggregates.has(digest_of(next_one))


@virtual
async def test_a_proposal_that_a_damaged_state_does_not_lead_to_speaks_against_nobody() -> None:
    holder, member = await make_nodes(2)
    await commit(holder)
    await member.keeper.follow(holder.keeper.branch, [holder.id])
    body = await holder.keeper.propose(claims_of(holder.head, 0), gradient(1))
    member.keeper.state.params[3] += 1.0
    assert await fetch_proposal(member, [holder], body) is None
    assert await fetch_proposal(member, [holder], body) == body, "the state was made anew"


@virtual
async def test_a_proposal_that_our_state_does_not_lead_to_is_not_held() -> None:
    liar, member = await make_nodes(2)
    right = await liar.keeper.propose(claims_of(liar.head, 0), gradient(1))
    wrong = changed(right, state=bytes(32))
    liar.keeper._held[wrong.digest] = wrong
    before = frozen(member)
    with pytest.raises(Refuted, match="our state does not lead there"):
        await fetch_proposal(member, [liar], wrong)
    assert member.keeper.holding == b""
    assert frozen(member) == before, "our state was right, and stays"


@virtual
async def test_who_committed_already_still_gives_the_proposal() -> None:
    """The first who sees the majority commits at once; another one may lack the body at that moment."""
    fast, slow = await make_nodes(2)
    body = await fast.keeper.propose(claims_of(fast.head, 0, 1), gradient(1))
    await fast.keeper.commit(record_of(body, 0, 1))
    assert await fetch_proposal(slow, [fast], body) == body


# -- a state that is damaged in memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 5])
@virtual
async def test_a_damaged_state_is_made_anew_from_the_disk(rounds: int, tmp_path: Path) -> None:
    (node,) = await make_nodes(1, folder=tmp_path)
    await train(node, rounds=rounds)
    assert await node.keeper.check()
    good, memory = frozen(node), node.keeper.state.params
    node.keeper.state.params.view(np.uint32)[7] ^= 1
    assert not await node.keeper.check()
    assert frozen(node) == good
    assert node.keeper.state.params is memory
    assert await node.keeper.check()
    await commit(node)


@virtual
async def test_a_damaged_state_goes_back_as_far_as_the_disk_reaches() -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=5)
    states = {round_: node.disk.log.record(round_) for round_ in range(1, 6)}
    lost = states[4]
    assert lost is not None and states[3] is not None
    node.disk.aggregates.drop(lost.body.aggregate)
    node.keeper.state.moments["m"][0] += 1.0
    assert not await node.keeper.check()
    assert node.head == states[3].head
    assert state_after(node) == states[3].body.state


@virtual
async def test_a_damaged_state_of_round_0_is_made_anew() -> None:
    (node,) = await make_nodes(1)
    node.keeper.state.params[0] += 1.0
    assert not await node.keeper.check()
    assert state_after(node) == node.disk.initial_state


# -- the rest --------------------------------------------------------------------------------------------------------


@virtual
async def test_a_checkpoint_counts_if_the_organiser_signed_it() -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=3)
    record = node.disk.log.record(2)
    assert record is not None
    organiser, stranger = identity_number(0), identity_number(1)
    assert not await node.keeper.anchor(Checkpoint.sign(stranger, node.disk.run_id, record.head))
    assert node.keeper.branch.anchor == 0
    assert await node.keeper.anchor(Checkpoint.sign(organiser, node.disk.run_id, record.head))
    assert node.keeper.branch.anchor == 2


def test_who_is_cancelled_in_a_commit_ends_it_first() -> None:
    """With real threads: half a commit would be none."""

    async def check() -> None:
        (node,) = await make_nodes(1)
        body = await node.keeper.propose(claims_of(node.head, 0), gradient(1))
        committing = asyncio.create_task(node.keeper.commit(record_of(body, 0)))
        await asyncio.sleep(0)
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        assert (node.head, state_after(node)) == (body.head, body.state)

    asyncio.run(check())
