"""Disk: what a peer comes back to, and what it keeps and drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from histories import Node, commit, frozen, gradient, train

from p2pllm.errors import StateError
from p2pllm.rounds.disk import KEPT_SNAPSHOTS, Disk, copy_of
from p2pllm.state import AdamW, SharedState
from p2pllm.state.chunks import digest_of
from p2pllm.testing import LAYOUT, MemoryNetwork, make_state, virtual

EVERY = 4  # rounds between two snapshots

ALIKE = np.linspace(0.1, 1.0, LAYOUT.size).astype(np.float32)


def make_node(folder: Path | None) -> Node:
    return Node(MemoryNetwork(), 0, folder, snapshot_every=EVERY)


async def trained(folder: Path | None, rounds: int) -> Node:
    """One peer with so many rounds, whose files are closed."""
    node = make_node(folder)
    await train(node, rounds=rounds)
    await node.keeper.close()
    return node


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def snapshots(node: Node) -> list[int]:
    return [found.round for found in node.disk.on_branch()]


def aggregate_of(node: Node, round_: int) -> bytes:
    record = node.disk.log.record(round_)
    assert record is not None
    return record.body.aggregate


# -- coming back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 1, 2, 4, 7, 13])
@virtual
async def test_a_restart_comes_to_the_same_head_with_the_same_bits(rounds: int, tmp_path: Path) -> None:
    before = await trained(tmp_path, rounds)
    again = make_node(tmp_path)
    assert frozen(again) == frozen(before)
    assert again.keeper.head == before.head
    await commit(again)


@virtual
async def test_without_a_folder_another_life_has_the_same_disk() -> None:
    node = await trained(None, 6)
    state = node.disk.recover(node.optimizer, None)
    assert state is not None and state.digest() == node.keeper.state.digest()
    assert not np.shares_memory(state.params, node.keeper.state.params)


@virtual
async def test_a_damaged_snapshot_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    before = await trained(tmp_path, 10)
    assert snapshots(before) == [8, 4]
    newest = before.disk.on_branch()[0]
    damage(tmp_path / "state" / newest.name)
    again = make_node(tmp_path)
    assert frozen(again) == frozen(before)
    assert snapshots(again) == [4]


@virtual
async def test_a_round_whose_aggregate_is_damaged_ends_the_replay(tmp_path: Path) -> None:
    await trained(tmp_path, 7)
    damage(tmp_path / "aggregates" / digest_of(gradient(5).data.cast("B")).hex())  # as `train` makes it for round 6
    again = make_node(tmp_path)
    record = again.disk.log.record(5)
    assert record is not None
    assert again.head == record.head, "the log goes back to where the state can be"
    assert again.keeper.state.digest() == record.body.state.hex()


@virtual
async def test_nothing_but_the_initial_state_is_left_when_all_is_gone(tmp_path: Path) -> None:
    await trained(tmp_path, 3)
    for file in (tmp_path / "state").iterdir():
        file.unlink()
    for file in (tmp_path / "aggregates").iterdir():
        file.unlink()
    again = make_node(tmp_path)
    assert again.head[0] == 0
    assert again.keeper.state.digest() == make_state().digest()


@virtual
async def test_a_machine_that_computes_another_step_says_so(tmp_path: Path) -> None:
    before = await trained(tmp_path, 3)
    section = before.manifest.optimizer.model_copy(update={"weight_decay": 0.5})
    other = AdamW(section, before.manifest.round.rounds, LAYOUT)
    disk = Disk(tmp_path, before.manifest, LAYOUT)
    with pytest.raises(StateError, match="Replaying round 2 gives another state here than the swarm's"):
        disk.recover(other, make_state())
    disk.close()


@virtual
async def test_replaying_changes_only_the_state_it_is_given() -> None:
    node = await trained(None, 3)
    initial = make_state()
    state = node.disk.recover(node.optimizer, initial)
    assert initial.digest() == make_state().digest()
    assert state is not None
    copy = copy_of(state)
    state.params[0] += 1.0
    assert copy.digest() == node.keeper.state.digest()


# -- what is kept ----------------------------------------------------------------------------------------------------


@virtual
async def test_snapshots_are_of_the_same_rounds_everywhere() -> None:
    node = make_node(None)
    assert [round_ for round_ in range(13) if node.disk.is_snapshot_round(round_)] == [0, 1, 4, 8, 12]


@virtual
async def test_the_newest_snapshots_are_kept_and_what_replays_from_the_older_one() -> None:
    node = await trained(None, 10)
    assert len(snapshots(node)) == KEPT_SNAPSHOTS
    kept = {round_ for round_ in range(1, 11) if node.disk.aggregates.has(aggregate_of(node, round_))}
    assert kept == set(range(5, 11))


@virtual
async def test_the_budget_is_kept_and_one_snapshot_is_enough() -> None:
    network = MemoryNetwork()
    node = Node(network, 0, snapshot_every=1000)
    node.disk.budget = 5 * LAYOUT.nbytes
    for _ in range(40):
        await train(node, rounds=1)
        if node.keeper._saving is not None:
            await node.keeper._saving
        assert sum(node.disk.aggregates.sizes()) <= 5 * LAYOUT.nbytes
    assert len(snapshots(node)) == 1
    state = node.disk.recover(node.optimizer, None)
    assert state is not None and state.digest() == node.keeper.state.digest()


@virtual
async def test_what_an_abandoned_branch_needed_is_dropped() -> None:
    node = await trained(None, 6)
    left = [aggregate_of(node, round_) for round_ in (4, 5, 6)]
    assert node.disk.log.rewind(node.disk.head_at(3))
    assert snapshots(node) == [1], "the one of round 4 is of the abandoned branch"
    node.disk.collect(set())
    assert all(map(node.disk.aggregates.has, left)), "what came since the snapshot was begun may be voted on"
    node.disk.collect(node.disk.aggregates.digests())
    assert not any(map(node.disk.aggregates.has, left))
    assert [found.round for found in node.disk.snapshots.all()] == [1]


@virtual
async def test_two_rounds_may_have_the_same_aggregate() -> None:
    """As of peers that all found a gradient of zero: dropped for the older round, it is needed for the newer one."""
    node = make_node(None)
    for _ in range(9):
        await commit(node, seed=1)
    await node.keeper.close()
    assert node.disk.aggregates.digests() == {digest_of(gradient(1).data.cast("B"))}


@virtual
async def test_a_reader_beside_the_peer_sees_its_rounds_and_changes_nothing(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    await train(node, rounds=5)
    reader = Disk(tmp_path, node.manifest, None, read_only=True)
    assert reader.log.branch == node.keeper.branch
    newest = reader.log.record(5)
    assert newest is not None
    np.testing.assert_array_equal(reader.update_of(newest.body, LAYOUT), gradient(4))
    with pytest.raises(StateError):
        reader.aggregates.put(digest_of(ALIKE.data.cast("B")), ALIKE.data.cast("B"))
    reader.close()
    await node.keeper.close()


@pytest.mark.parametrize("vector", [np.full(LAYOUT.size, np.inf, np.float32), np.zeros(LAYOUT.size - 1, np.float32)])
@virtual
async def test_an_aggregate_that_is_none_is_not_given(vector: np.ndarray) -> None:
    node = make_node(None)
    await train(node, rounds=1)
    record, data = node.disk.log.record(1), vector.data.cast("B")
    assert record is not None and node.disk.update_of(record.body, LAYOUT) is not None
    node.disk.aggregates.put(digest_of(data), data)
    assert node.disk.update_of(record.body.model_copy(update={"aggregate": digest_of(data)}), LAYOUT) is None


def test_a_copy_shares_nothing() -> None:
    state: SharedState = make_state(3)
    copy = copy_of(state)
    assert copy.digest() == state.digest()
    for one, other in zip(state.vectors, copy.vectors, strict=True):
        assert not np.shares_memory(one, other)
