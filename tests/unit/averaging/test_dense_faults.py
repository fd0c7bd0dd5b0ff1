"""Whatever one member does, the others end in time, name it, apply nothing, and leave nothing behind."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from cluster import Cluster, check, make_group, make_vectors, virtual

from p2pllm.averaging import ExchangeResult, Group
from p2pllm.averaging.attempt import MAGIC, STREAM_METHOD
from p2pllm.averaging.codecs import Floats
from p2pllm.averaging.dense import MAX_PENDING_PER_PEER, NOTICE_METHOD
from p2pllm.testing import MemoryHost

PART = 1024
"""Elements of a part in these tests."""


def without(vectors: dict[str, Floats], *members: str) -> dict[str, Floats]:
    return {member: vector for member, vector in vectors.items() if member not in members}


def check_blamed(results: Iterable[ExchangeResult], *members: str) -> None:
    """All failed, and everybody names `members`: by sight, or by hearsay from who saw it."""
    for result in results:
        assert result.aggregate is None
        assert result.reason
        named = result.failed.union(*result.accused.values())
        assert named == set(members), (result.failed, result.accused, result.reason)


class Rogue:
    """A member that speaks the protocol by hand."""

    def __init__(
        self, peer: MemoryHost, group: Group, vector: Floats, *, reads: bool = True, means: bytes = b""
    ) -> None:
        self.peer, self.group, self.vector, self.reads, self.means = peer, group, vector, reads, means
        self.forever = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        async def quiet(caller: str, payload: bytes) -> bytes:
            return b""

        await self.peer.serve_stream(STREAM_METHOD, self.reduce)
        await self.peer.serve_call(NOTICE_METHOD, quiet)
        others = [member for member in self.group.members if member != self.peer.peer_id]
        self.tasks = [asyncio.create_task(self.contribute(member)) for member in others]

    async def reduce(self, caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        """Accept the stream, answer with the means that we were given, and with no more."""
        writer.write(b"A" + self.means)
        while self.reads and await reader.read(1 << 16):
            pass
        if not self.reads:
            await self.forever.wait()

    async def contribute(self, member: str) -> None:
        reader, writer = await self.peer.open_stream(member, STREAM_METHOD)
        writer.write(MAGIC + self.group.group_id + self.group.digest(PART))
        for part in self.group.parts(self.group.members.index(member), PART):
            writer.write(self.vector[part].tobytes())
            await writer.drain()
        while self.reads and await reader.read(1 << 16):
            pass

    async def stop(self) -> None:
        self.forever.set()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for pipe in list(self.peer.pipes):
            pipe.abort()


async def run_with_rogue(
    cluster: Cluster, group: Group, vectors: dict[str, Floats], rogue: Rogue
) -> dict[str, ExchangeResult]:
    await rogue.start()
    try:
        return await cluster.run(group, without(vectors, rogue.peer.peer_id))
    finally:
        await rogue.stop()


@virtual
async def test_a_member_that_cannot_be_reached(cluster: Cluster) -> None:
    group = make_group(3, 10_000)
    vectors = make_vectors(group)
    check_blamed((await cluster.run(group, without(vectors, "c"))).values(), "c")


@virtual
async def test_a_member_that_never_starts(cluster: Cluster) -> None:
    group = make_group(4, 10_000)
    vectors = make_vectors(group)
    await cluster.engine("c")
    loop = asyncio.get_running_loop()
    before = loop.time()
    results = await cluster.run(group, without(vectors, "c"))
    check_blamed(results.values(), "c")
    assert loop.time() - before < 2 * 5.0


@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("written", [1, 70, 30_000, 60_000])
@virtual
async def test_a_member_that_dies_midway(cluster: Cluster, members: int, written: int) -> None:
    group = make_group(members, 40_000)
    vectors = make_vectors(group)
    for member in vectors:
        await cluster.engine(member)
    victim = cluster.host("b")
    dying = asyncio.create_task(cluster.engines["b"].run(group, vectors["b"], 60))

    def on_write(so_far: int) -> None:
        if so_far >= written and not victim.dead:
            dying.cancel()
            victim.kill()

    victim.on_write = on_write
    results = await cluster.run(group, without(vectors, "b"))
    check_blamed(results.values(), "b")
    await asyncio.gather(dying, return_exceptions=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 5_000, 9_999])
@virtual
async def test_values_that_are_not_finite_come_from_a_liar(cluster: Cluster, bad: float, position: int) -> None:
    group = make_group(3, 10_000)
    vectors = make_vectors(group)
    vectors["b"][position] = bad
    rogue = Rogue(cluster.host("b"), group, vectors["b"])
    results = await run_with_rogue(cluster, group, vectors, rogue)
    check_blamed(results.values(), "b")


@virtual
async def test_our_own_bad_vector_is_our_fault(cluster: Cluster) -> None:
    for codec_name in ("fp32", "fp16", "bf16", "int8"):
        group = make_group(3, 10_000, codec_name)
        vectors = make_vectors(group)
        vectors["c"][4_000] = np.inf
        results = await cluster.run(group, vectors)
        assert results["c"].failed == {"c"}
        check_blamed(results.values(), "c")


@pytest.mark.parametrize("members", [2, 3])
@virtual
async def test_a_member_that_stops_reading(cluster: Cluster, members: int) -> None:
    """It has sent all its values, so only writes to it block; they are bounded too."""
    group = make_group(members, 1_500_000)
    vectors = make_vectors(group)
    rogue = Rogue(cluster.host("b"), group, vectors["b"], reads=False)
    loop = asyncio.get_running_loop()
    before = loop.time()
    results = await run_with_rogue(cluster, group, vectors, rogue)
    check_blamed(results.values(), "b")
    assert loop.time() - before < 2 * 5.0


@virtual
async def test_a_reducer_that_gives_nothing_back(cluster: Cluster) -> None:
    group = make_group(3, 10_000)
    vectors = make_vectors(group)
    rogue = Rogue(cluster.host("b"), group, vectors["b"])
    check_blamed((await run_with_rogue(cluster, group, vectors, rogue)).values(), "b")


@virtual
async def test_means_that_are_not_finite_are_not_taken(cluster: Cluster) -> None:
    group = make_group(3, 10_000)
    vectors = make_vectors(group)
    lies = np.full(len(group.span(1)), np.nan, np.float32).tobytes()
    rogue = Rogue(cluster.host("b"), group, vectors["b"], means=lies)
    check_blamed((await run_with_rogue(cluster, group, vectors, rogue)).values(), "b")


@pytest.mark.parametrize(
    "change", [{"size": 9_999}, {"codec": "fp16"}, {"weights": (1.0, 2.0, 4.0)}, {"members": ("a", "c", "b")}]
)
@virtual
async def test_other_terms_are_refused_at_once(cluster: Cluster, change: dict[str, object]) -> None:
    group = make_group(3, 10_000)
    vectors = make_vectors(group)
    other = replace(group, **change)  # type: ignore[arg-type]
    for member in vectors:
        await cluster.engine(member)
    loop = asyncio.get_running_loop()
    before = loop.time()
    odd = cluster.engines["c"].run(other, vectors["c"][: other.size].copy(), 60)
    first, second, third = await asyncio.gather(
        cluster.engines["a"].run(group, vectors["a"], 60),
        cluster.engines["b"].run(group, vectors["b"], 60),
        odd,
    )
    assert first.aggregate is second.aggregate is third.aggregate is None
    assert "c" in first.failed | second.failed
    assert any("terms" in result.reason for result in (first, second, third))
    assert loop.time() - before < 5.0


@virtual
async def test_strangers_and_doubles_are_refused_and_harm_nobody(cluster: Cluster) -> None:
    group = make_group(2, 10_000)
    vectors = make_vectors(group)
    header = MAGIC + group.group_id + group.digest(PART)
    stranger = cluster.host("z")
    for member in vectors:
        await cluster.engine(member)
    opened = []
    for opener, greeting in [
        (stranger, header),
        (stranger, b"x" * len(header)),
        (cluster.host("a"), header),
    ]:
        reader, writer = await opener.open_stream("b", STREAM_METHOD)
        writer.write(greeting)
        opened.append((reader, writer))
        # The next one, and a's real stream, come after this one.
        await asyncio.sleep(0.1)
    opened.pop()[1].close()
    results = await cluster.run(group, vectors)
    for reader, writer in opened:
        assert await reader.read() == b"R"
        writer.close()
    # Whose stream came first is a's own affair; a double never mixes with the first.
    if results["b"].aggregate is not None:
        check(group, vectors, {"b": results["b"]})
    else:
        assert results["b"].failed <= {"a"}


@virtual
async def test_pending_streams_are_bounded_and_time_out(cluster: Cluster) -> None:
    group = make_group(2, 10_000)
    await cluster.engine("b")
    caller = cluster.host("a")
    streams = [await caller.open_stream("b", STREAM_METHOD) for _ in range(MAX_PENDING_PER_PEER + 2)]
    for index, (_, writer) in enumerate(streams):
        writer.write(MAGIC + group.group_id + bytes([index]) * 32 + bytes(1 << 20))
    loop = asyncio.get_running_loop()
    before = loop.time()

    async def refused_after(reader: StreamReader, writer: StreamWriter) -> float:
        assert await reader.read(1) == b"R"
        writer.transport.abort()
        return loop.time() - before

    times = await asyncio.gather(*(refused_after(*stream) for stream in streams))
    assert sorted(time < 5 for time in times) == [False] * MAX_PENDING_PER_PEER + [True] * 2
    assert max(times) < 60


@virtual
async def test_a_stream_that_comes_too_late_learns_so(cluster: Cluster) -> None:
    group = make_group(2, 10_000)
    vectors = make_vectors(group)
    check(group, vectors, await cluster.run(group, vectors))
    reader, writer = await cluster.host("a").open_stream("b", STREAM_METHOD)
    writer.write(MAGIC + group.group_id + group.digest(PART))
    assert await reader.read(1) == b"F"
    writer.close()


@virtual
async def test_the_deadline_ends_everything(cluster: Cluster) -> None:
    """A deadline shorter than the stall timeout."""
    group = make_group(3, 10_000)
    vectors = make_vectors(group)
    await cluster.engine("c")
    loop = asyncio.get_running_loop()
    before = loop.time()
    results = await cluster.run(group, without(vectors, "c"), deadline=2.0)
    assert loop.time() - before <= 2.0
    check_blamed(results.values(), "c")


@virtual
async def test_cancellation_cleans_up_and_the_others_hear_of_it(cluster: Cluster) -> None:
    group = make_group(3, 10_000)
    vectors = make_vectors(group)
    for member in vectors:
        await cluster.engine(member)
    runs = [asyncio.create_task(cluster.engines[m].run(group, vectors[m], 60)) for m in "ab"]
    await asyncio.sleep(1)
    runs[0].cancel()
    await asyncio.wait([runs[0]])
    assert runs[0].cancelled()
    result = await runs[1]
    assert result.aggregate is None
    assert result.failed == {"a"}


@virtual
async def test_a_new_group_of_the_survivors_succeeds(cluster: Cluster) -> None:
    group = make_group(4, 10_000)
    vectors = make_vectors(group)
    results = await cluster.run(group, without(vectors, "d"))
    check_blamed(results.values(), "d")
    retry = make_group(3, 10_000)
    check(retry, without(vectors, "d"), await cluster.run(retry, without(vectors, "d")))


@virtual
async def test_notices_of_strangers_and_nonsense_are_ignored(cluster: Cluster) -> None:
    group = make_group(2, 10_000)
    vectors = make_vectors(group)
    for member in vectors:
        await cluster.engine(member)
    early = asyncio.create_task(cluster.engines["a"].run(group, vectors["a"], 60))
    await asyncio.sleep(0.5)
    good = group.group_id + group.digest(PART) + bytes(32)
    for caller, payload in [("z", good), ("b", good[:-1]), ("b", b""), ("b", bytes(96)), ("b", good + b"x")]:
        await cluster.host(caller).call("a", NOTICE_METHOD, payload, 1)
    late = await cluster.engines["b"].run(group, vectors["b"], 60)
    check(group, vectors, {"a": await early, "b": late})
