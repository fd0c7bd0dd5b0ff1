"""Catching up: by replay or with a snapshot from several peers, resumed after a break, and never to a worse branch."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from histories import EVERY, Node, frozen, make_nodes, saved, train

from p2pllm.network.bulk import Blob
from p2pllm.rounds import catchup
from p2pllm.testing import LAYOUT, MemoryNetwork, virtual

SMALL_CHUNK = 256
CHUNKS = 30
"""Of a state whose chunks have SMALL_CHUNK bytes: 10 a vector."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of several chunks."""
    monkeypatch.setattr("p2pllm.state.chunks.CHUNK_BYTES", SMALL_CHUNK)


def chunks_from(node: Node) -> set[int]:
    return {request["index"] for request in node.asked if request["what"] == "chunk"}


# -- replay or snapshot ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3])
@virtual
async def test_a_few_missed_rounds_are_replayed(rounds: int) -> None:
    ahead, behind = await make_nodes(2)
    await train(ahead, behind, rounds=5)
    memory = behind.keeper.state.params
    await train(ahead, rounds=rounds)
    assert await behind.follow(ahead)
    assert frozen(behind) == frozen(ahead)
    assert Counter(ahead.what) == {"log": 1, "aggregate": rounds}
    assert behind.keeper.state.params is memory
    assert behind.disk.log.record(5 + rounds) == ahead.disk.log.record(5 + rounds), "it can serve what it took"


@virtual
async def test_who_missed_many_rounds_takes_a_snapshot_and_replays_the_rest() -> None:
    ahead, behind = await make_nodes(2)
    await train(ahead, behind, rounds=2)
    await train(ahead, rounds=17)
    await saved(ahead)
    assert await behind.follow(ahead)
    assert frozen(behind) == frozen(ahead)
    assert Counter(ahead.what)["aggregate"] == 3
    assert behind.disk.on_branch()[0].round == 16, "what was fetched is kept, and can be served"


@virtual
async def test_a_small_disk_replays_in_slices_what_it_has_no_room_for(tmp_path: Path) -> None:
    network = MemoryNetwork()
    ahead = await Node(network, 0, snapshot_every=1000).start()
    behind = await Node(network, 1, tmp_path, snapshot_every=1000).start()
    await train(ahead, behind, rounds=2)
    await train(ahead, rounds=20)
    ahead.disk.snapshots.drop(ahead.disk.on_branch()[0])  # nothing but the replay leads on
    size, most, put = LAYOUT.nbytes, 0, behind.disk.aggregates.put
    behind.disk.budget = 6 * size

    def watched(digest: bytes, data: Any) -> None:
        nonlocal most
        put(digest, data)
        most = max(most, sum(behind.disk.aggregates.sizes()))

    behind.disk.aggregates.put = watched  # type: ignore[method-assign]
    assert await behind.follow(ahead)
    assert frozen(behind) == frozen(ahead)
    assert Counter(ahead.what)["aggregate"] == 20, "each once"
    assert 5 * size <= most <= 6 * size
    behind.disk.close()
    again = Node(MemoryNetwork(), 1, tmp_path, snapshot_every=1000)
    assert again.head == ahead.head, "what is on the disk leads to where it was"


@virtual
async def test_a_replay_in_slices_that_breaks_off_leaves_all_that_was_there() -> None:
    ahead, behind = await make_nodes(2, snapshot_every=1000)
    await train(ahead, behind, rounds=2)
    await train(ahead, rounds=9)
    ahead.disk.snapshots.drop(ahead.disk.on_branch()[0])
    behind.disk.budget = 4 * LAYOUT.nbytes
    before, held = frozen(behind), behind.disk.aggregates.digests()
    last = ahead.disk.log.record(11)
    assert last is not None
    ahead.disk.aggregates.drop(last.body.aggregate)
    assert not await behind.follow(ahead)
    assert frozen(behind) == before
    assert held <= behind.disk.aggregates.digests()


@virtual
async def test_what_lies_on_our_own_disk_is_not_fetched() -> None:
    ahead, behind = await make_nodes(2)
    await train(ahead, behind, rounds=5)
    behind.disk.log.rewind(behind.disk.head_at(2))  # as when it left this branch
    behind.keeper.state.params[:] = 0.0  # of no use any more
    state = behind.disk.newest_base()
    assert state is not None and state.round == 1
    behind.keeper.has_state = False
    assert await behind.follow(ahead)
    assert frozen(behind) == frozen(ahead)
    assert "aggregate" not in ahead.what and "chunk" not in ahead.what


@virtual
async def test_a_long_log_comes_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pllm.rounds.serving.PAGE_BYTES", 2000)
    ahead, behind = await make_nodes(2)
    await train(ahead, rounds=20)
    await saved(ahead)
    assert await behind.follow(ahead)
    assert frozen(behind) == frozen(ahead)
    assert Counter(ahead.what)["log"] > 3


@virtual
async def test_more_than_can_be_taken_at_once_is_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catchup, "MAX_TAKEN", 1)
    monkeypatch.setattr("p2pllm.rounds.serving.PAGE_BYTES", 1000)
    ahead, behind = await make_nodes(2)
    await train(ahead, rounds=3)
    for round_ in (1, 2, 3):
        assert await behind.follow(ahead)
        if behind.head[0] == 3:
            break
        assert behind.head[0] >= round_
    assert frozen(behind) == frozen(ahead)


@virtual
async def test_a_donor_that_has_moved_on_takes_us_along() -> None:
    donor, behind = await make_nodes(2)
    await train(donor, rounds=2)
    claimed = donor.keeper.branch
    await train(donor, rounds=1)
    assert await behind.keeper.follow(claimed, [donor.id])
    assert frozen(behind) == frozen(donor)


@virtual
async def test_a_state_that_is_damaged_in_memory_is_no_start() -> None:
    ahead, behind = await make_nodes(2)
    await train(ahead, behind, rounds=3)
    await train(ahead, rounds=1)
    behind.keeper.state.params[7] += 1.0
    await behind.follow(ahead) or await behind.follow(ahead)  # the first one may only find it out
    assert frozen(behind) == frozen(ahead)


@virtual
async def test_other_initial_weights_are_no_state() -> None:
    network = MemoryNetwork()
    right = await Node(network, 0).start()
    other = await Node(network, 1, seed=5).start()
    assert not other.keeper.has_state
    assert not await other.keeper.follow(right.keeper.branch, [])
    assert await other.follow(right)
    assert other.keeper.has_state
    assert frozen(other) == frozen(right)


# -- several sources -------------------------------------------------------------------------------------------------


@virtual
async def test_chunks_come_from_all_who_have_them(small_chunks: None) -> None:
    *donors, fresh = await make_nodes(4)
    await train(*donors, rounds=EVERY + 1)
    await saved(*donors)
    assert await fresh.follow(*donors)
    assert frozen(fresh) == frozen(donors[0])
    assert set.union(*map(chunks_from, donors)) == set(range(CHUNKS))
    assert all(len(chunks_from(donor)) >= CHUNKS // 5 for donor in donors)


@virtual
async def test_one_that_lies_one_that_is_slow_and_one_that_dies_stop_nobody(small_chunks: None) -> None:
    good, liar, slow, dying, fresh = await make_nodes(5)
    donors = [liar, slow, dying, good]
    await train(*donors, rounds=EVERY + 1)
    await saved(*donors)

    async def lie(request: dict[str, Any]) -> Blob | None:
        blob = await liar.keeper.serve(request)
        return Blob({}, [bytes(SMALL_CHUNK)]) if blob is not None and request["what"] == "chunk" else blob

    async def die(request: dict[str, Any]) -> Blob | None:
        if dying.what.count("chunk") == 3:
            asyncio.get_running_loop().call_soon(dying.host.kill, context=dying.host.network.context)
        return await dying.keeper.serve(request)

    liar.answer, dying.answer = lie, die
    slow.host.network.slow(slow.id, 1.0)
    begin = asyncio.get_running_loop().time()
    assert await fresh.follow(good, liar, slow, dying)
    assert frozen(fresh) == frozen(good)
    assert dying.host.dead
    assert fresh.keeper.refuted == {liar.id}
    assert len(chunks_from(liar)) <= 2
    # Asking the slow one what it has takes it 4 s; its chunks are not waited for, or they would take 8 s a pair.
    assert asyncio.get_running_loop().time() - begin < 12.0


@pytest.mark.parametrize("how", ["the donor dies", "the joiner dies too"])
@virtual
async def test_a_download_that_broke_off_goes_on_where_it_was(how: str, tmp_path: Path, small_chunks: None) -> None:
    network = MemoryNetwork()
    first, second = [await Node(network, number, snapshot_every=EVERY).start() for number in range(2)]
    fresh = await Node(network, 2, tmp_path, snapshot_every=EVERY).start()
    await train(first, second, rounds=EVERY + 1)
    await saved(first, second)

    async def die(request: dict[str, Any]) -> Blob | None:
        if len(chunks_from(first)) > 10:
            asyncio.get_running_loop().call_soon(first.host.kill, context=network.context)
        return await first.keeper.serve(request)

    first.answer = die
    before = frozen(fresh)
    assert not await fresh.follow(first)
    assert frozen(fresh) == before
    if how == "the joiner dies too":
        await fresh.keeper.close()
        fresh.host.kill()
        fresh = await Node(network, 2, tmp_path, snapshot_every=EVERY).start()
    assert await fresh.follow(second)
    assert frozen(fresh) == frozen(second)
    assert 8 <= CHUNKS - len(chunks_from(second)) < CHUNKS
    assert len(chunks_from(second)) + len(chunks_from(first)) <= CHUNKS + 8, "but for those that were under way"


@virtual
async def test_an_aggregate_comes_from_whoever_has_the_right_one() -> None:
    liar, gone, poor, good, behind = await make_nodes(5)
    donors = [liar, gone, poor, good]
    await train(*donors, rounds=1)

    async def lie(request: dict[str, Any]) -> Blob | None:
        blob = await liar.keeper.serve(request)
        return Blob({}, [bytes(blob.size)]) if blob is not None and request["what"] == "aggregate" else blob

    async def have_none(request: dict[str, Any]) -> Blob | None:
        return await poor.keeper.serve(request) if request["what"] == "log" else None

    liar.answer, poor.answer = lie, have_none
    gone.host.kill()
    assert await behind.follow(*donors)
    assert frozen(behind) == frozen(good)
    assert good.what == ["aggregate"]


@virtual
async def test_a_record_that_is_damaged_on_our_disk_is_had_from_whoever_gives_the_right_one(tmp_path: Path) -> None:
    network = MemoryNetwork()
    liar, good = [await Node(network, number, snapshot_every=EVERY).start() for number in range(2)]
    node = Node(network, 2, tmp_path, snapshot_every=EVERY)
    await train(liar, good, node, rounds=EVERY + 1)
    await saved(node)
    await node.keeper.close()
    node.host.kill()
    record, other = good.disk.log.record(3), good.disk.log.record(4)
    assert record is not None and other is not None
    data = bytearray((tmp_path / "log").read_bytes())
    data[data.index(record.body.pack()) + 50] ^= 1
    (tmp_path / "log").write_bytes(data)
    again = Node(network, 2, tmp_path, snapshot_every=EVERY)
    assert again.disk.log.missing() == [record.head]

    async def lie(request: dict[str, Any]) -> Blob | None:
        return Blob({}, [other.pack()])

    liar.answer = lie
    await again.keeper.mend([liar.id])
    assert again.disk.log.missing() == [record.head]
    await again.keeper.mend([liar.id, good.id])
    assert again.disk.log.missing() == []
    assert again.disk.log.record(3) == record
    await again.keeper.close()
