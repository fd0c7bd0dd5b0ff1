"""All members of a healthy group end with the same bits, and with the right ones."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from cluster import Cluster, SocketNetwork, check, make_group, make_vectors, virtual
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.averaging import DenseAllReduce, Group, codec
from p2pllm.averaging.attempt import STREAM_METHOD, Attempt
from p2pllm.averaging.dense import LANE_BYTES, MAX_LANES, lanes_for
from p2pllm.averaging.vigil import GaveUp
from p2pllm.network.transport import MUCH_BYTES
from p2pllm.testing import MemoryHost, MemoryNetwork


@pytest.mark.parametrize("codec_name", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize(("members", "lanes"), [(1, 1), (2, 1), (3, 4), (5, 1), (8, 2)])
@virtual
async def test_same_bits_as_the_reference(cluster: Cluster, members: int, lanes: int, codec_name: str) -> None:
    cluster.lanes = lanes
    group = make_group(members, 20_011, codec_name)
    vectors = make_vectors(group)
    results = await cluster.run(group, vectors)
    check(group, vectors, results)
    for result in results.values():
        assert (result.bytes_sent > 0) == (members > 1)
        assert result.seconds["total"] >= result.seconds["reduce"]
    parts = [part for index in range(members) for part in group.parts(index, 1024)]
    a_copy = sum(codec(codec_name).bytes_for(part.stop - part.start) for part in parts)
    sent = sum(result.bytes_sent for result in results.values())
    assert sent == members * (members - 1) * lanes * 70 + 2 * (members - 1) * a_copy


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(0, 1500),
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8),
    codec_name=st.sampled_from(["fp32", "fp16", "bf16", "int8"]),
    sockets=st.booleans(),
    lanes=st.integers(1, 4),
)
@virtual
async def test_any_size_and_weights(
    size: int, weights: list[float], codec_name: str, sockets: bool, lanes: int
) -> None:
    cluster = Cluster(SocketNetwork() if sockets else MemoryNetwork(), lanes)
    group = make_group(len(weights), size, codec_name, weights)
    vectors = make_vectors(group)
    check(group, vectors, await cluster.run(group, vectors))
    await cluster.check_clean()


@virtual
async def test_groups_in_a_row_and_at_once(cluster: Cluster) -> None:
    groups = [make_group(3, 5000) for _ in range(4)]
    vectors = [make_vectors(group, seed) for seed, group in enumerate(groups)]
    first = await cluster.run(groups[0], vectors[0])
    rest = await asyncio.gather(*map(cluster.run, groups[1:], vectors[1:]))
    for each in zip(groups, vectors, [first, *rest], strict=True):
        check(*each)


@virtual
async def test_input_is_left_alone_and_output_is_not_the_input(cluster: Cluster) -> None:
    group = make_group(2, 9000)
    vectors = make_vectors(group)
    before = {member: vector.copy() for member, vector in vectors.items()}
    results = await cluster.run(group, vectors)
    for member, vector in vectors.items():
        np.testing.assert_array_equal(vector, before[member])
        assert not np.shares_memory(vector, results[member].aggregate)


@virtual
async def test_late_member_is_waited_for(cluster: Cluster) -> None:
    """The streams of faster members wait without being read, until the group starts here."""
    group = make_group(3, 60_000)
    vectors = make_vectors(group)
    for member in vectors:
        await cluster.engine(member)
    early = [asyncio.create_task(cluster.engines[m].run(group, vectors[m], 60)) for m in "ab"]
    await asyncio.sleep(4.5)
    # Of 80 kB for c only what fits between them has left.
    late = await cluster.engines["c"].run(group, vectors["c"], 60)
    check(group, vectors, {"c": late, "a": await early[0], "b": await early[1]})


@virtual
async def test_finite_values_at_the_edge_stay_finite(cluster: Cluster) -> None:
    for codec_name in ("fp32", "fp16", "bf16", "int8"):
        group = make_group(3, 300, codec_name, [1, 1, 1])
        vectors = {m: np.full(300, np.finfo(np.float32).max, np.float32) for m in group.members}
        for result in (await cluster.run(group, vectors)).values():
            assert result.aggregate is not None
            assert np.isfinite(result.aggregate).all()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 64 * 8, 100_003])
@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_spans_cover_the_vector_once(members: int, size: int) -> None:
    group = make_group(members, size)
    spans = [group.span(index) for index in range(members)]
    assert [element for span in spans for element in (span.start, span.stop) if span] == [
        element for span in spans if span for element in (span.start, span.stop)
    ]
    assert sum(map(len, spans)) == size
    assert all(span.start % 64 == 0 for span in spans if span)
    assert max(map(len, spans)) - min(map(len, spans)) <= 127
    parts = [part for index in range(members) for part in group.parts(index, 256)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][:-1] if parts else size == 0


def test_digest_tells_every_field_apart() -> None:
    base = make_group(3, 100)
    others = [
        Group(bytes(32), base.members, base.weights, base.size, base.codec),
        Group(base.group_id, ("a", "c", "b"), base.weights, base.size, base.codec),
        Group(base.group_id, base.members, (1.0, 2.0, 3.5), base.size, base.codec),
        Group(base.group_id, base.members, base.weights, 101, base.codec),
        Group(base.group_id, base.members, base.weights, base.size, "fp16"),
    ]
    digests = {group.digest(256) for group in [base, *others]} | {base.digest(512)}
    assert len(digests) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"group_id": b"short"},
        {"members": ()},
        {"members": ("a", "a")},
        {"weights": (1.0,)},
        {"weights": (1.0, 0.0)},
        {"weights": (1.0, -1.0)},
        {"weights": (1.0, float("nan"))},
        {"weights": (1e308, 1e308)},
        {"size": -1},
        {"codec": "zip"},
    ],
)
def test_a_group_that_cannot_be_used_is_refused(change: dict[str, object]) -> None:
    fields = {
        "group_id": bytes(32),
        "members": ("a", "b"),
        "weights": (1.0, 1.0),
        "size": 10,
        "codec": "fp32",
    }
    with pytest.raises(ValueError, match=r"."):
        Group(**{**fields, **change})  # type: ignore[arg-type]


@virtual
async def test_callers_mistakes_raise(cluster: Cluster) -> None:
    group = make_group(1, 10)
    engine, stranger = await cluster.engine("a"), await cluster.engine("z")
    for bad in (np.zeros(10), np.zeros(11, np.float32), np.zeros(20, np.float32)[::2]):
        with pytest.raises(ValueError, match="vector"):
            await engine.run(group, bad, 5)
    with pytest.raises(ValueError, match="member"):
        await stranger.run(group, np.zeros(10, np.float32), 5)
    await engine.run(group, np.zeros(10, np.float32), 5)
    with pytest.raises(ValueError, match="before"):
        await engine.run(group, np.zeros(10, np.float32), 5)


@pytest.mark.parametrize(
    ("codec_name", "members", "lanes"), [("fp32", 2, 4), ("fp16", 2, 3), ("int8", 2, 1), ("fp32", 3, 2), ("fp32", 9, 1)]
)
def test_lanes_follow_what_travels_and_to_how_many(codec_name: str, members: int, lanes: int) -> None:
    group = make_group(members, members * 3 * LANE_BYTES // 2, codec_name)
    assert lanes_for(group) == lanes
    assert lanes == 1 or lanes * (members - 1) <= MAX_LANES
    assert lanes_for(make_group(1, 100, codec_name)) == 1


class Noting(MemoryHost):
    """Notes what it says of the bytes that are to travel."""

    expected: set[int]

    async def open_stream(self, peer: str, method: str, expected: int = 0):
        if method == STREAM_METHOD:
            self.__dict__.setdefault("expected", set()).add(expected)
        return await super().open_stream(peer, method, expected)


@pytest.mark.parametrize(("codec_name", "values", "is_much"), [("int8", 5_000_000, True), ("fp32", 60_000, False)])
@virtual
async def test_all_that_a_member_moves_with_another_counts_as_much(codec_name: str, values: int, is_much: bool) -> None:
    network = MemoryNetwork()
    network.host_class = Noting
    group = make_group(8, values, codec_name)
    vectors = make_vectors(group)
    made = {member: DenseAllReduce(network.host(member)) for member in group.members}
    for each in made.values():
        await each.start()
    await asyncio.gather(*(made[member].run(group, vectors[member], 60.0) for member in group.members))
    for host in network.hosts.values():
        (expected,) = host.expected
        assert (expected >= MUCH_BYTES) == is_much
        assert expected == 2 * codec(codec_name).bytes_for(values // 8)


@virtual
async def test_all_that_went_wrong_at_once_is_said() -> None:
    async def fail(peer: str) -> None:
        raise GaveUp(frozenset({peer}), f"{peer} broke.")

    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            for peer in "bcb":
                tasks.create_task(fail(peer))

    group = make_group(3, 100)
    host = MemoryNetwork().host("a")
    vector = make_vectors(group)["a"]
    attempt = Attempt(host, group, vector, np.empty_like(vector), part_elements=64, stall_timeout=5.0)
    working = asyncio.create_task(work())
    await asyncio.wait([working])
    with pytest.raises(GaveUp) as caught:
        attempt._judge(working, asyncio.create_task(asyncio.sleep(0)))
    assert caught.value.reason == "b broke; c broke." and caught.value.blamed == {"b", "c"}
    attempt.close()
