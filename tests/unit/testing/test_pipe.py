"""Streams in memory: order, latency, backpressure, and every way in which they end."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import Coroutine
from typing import Any

import pytest

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.testing import MemoryHost, MemoryNetwork, virtual
from p2pllm.testing.host import OPEN_STREAM_S
from p2pllm.testing.pipe import WINDOW_BYTES

Ends = tuple[StreamReader, StreamWriter]


async def connect(network: MemoryNetwork | None = None) -> tuple[MemoryHost, MemoryHost, Ends, Ends]:
    """Two hosts, and both ends of a stream between them."""
    network = network or MemoryNetwork()
    one, two = network.host(0), network.host(1)
    far: asyncio.Future[Ends] = asyncio.get_running_loop().create_future()

    async def keep(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        far.set_result((reader, writer))
        await asyncio.Event().wait()

    await two.serve_stream("talk", keep)
    near = await one.open_stream(two.peer_id, "talk")
    return one, two, near, await far


async def waits(seconds: float, work: Coroutine[Any, Any, object]) -> asyncio.Future[object]:
    """Start `work`, which must not be done after so many seconds."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(seconds)
    assert not task.done()
    return task


@virtual
async def test_bytes_arrive_in_order_after_the_latency():
    _, _, (_, writer), (reader, _) = await connect(MemoryNetwork(latency_s=0.5, jitter_s=0.4, seed=3))
    begin = asyncio.get_running_loop().time()
    pieces = [bytes([number]) * 10 for number in range(50)]
    for piece in pieces:
        writer.write(piece)
    assert await reader.readexactly(500) == b"".join(pieces)
    assert 0.5 <= asyncio.get_running_loop().time() - begin <= 0.9


@virtual
async def test_both_directions_are_counted():
    one, two, (reader, writer), (far_reader, far_writer) = await connect()
    seen: list[int] = []
    one.on_write = seen.append
    writer.write(b"12345")
    writer.write(b"678")
    far_writer.write(b"90")
    await far_reader.readexactly(8)
    await reader.readexactly(2)
    assert (one.sent["talk"].messages, one.sent["talk"].bytes, one.received["talk"].bytes) == (1, 8, 2)
    assert (two.received["talk"].messages, two.received["talk"].bytes, two.sent["talk"].bytes) == (1, 8, 2)
    assert seen == [5, 8]


@virtual
async def test_who_does_not_read_stops_who_writes():
    _, _, (_, writer), (reader, _) = await connect()
    written = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60.0):
            while True:
                writer.write(bytes(1000))
                written += 1000
                await writer.drain()
    assert WINDOW_BYTES < written < 4 * WINDOW_BYTES
    assert len(await reader.readexactly(written)) == written
    async with asyncio.timeout(1.0):
        await writer.drain()


@virtual
async def test_a_paused_end_takes_nothing():
    _, _, (_, writer), (reader, far_writer) = await connect()
    far_writer.transport.pause_reading()
    writer.write(b"later")
    reading = await waits(5.0, reader.read(10))
    far_writer.transport.resume_reading()
    assert await reading == b"later"


@virtual
async def test_closing_says_so_after_what_was_written():
    _, _, (reader, writer), (far_reader, far_writer) = await connect()
    writer.write(b"last words")
    writer.close()
    assert await far_reader.read() == b"last words"
    far_writer.write(b"too late")
    with pytest.raises(ConnectionError):
        await far_writer.drain()
    assert await reader.read() == b""


@virtual
async def test_an_abort_drops_what_has_not_arrived():
    _, _, (_, writer), (far_reader, _) = await connect()
    writer.write(b"first")
    await asyncio.sleep(0.1)
    writer.write(b"second")
    writer.transport.abort()
    assert await far_reader.read() == b"first"


@virtual
async def test_a_writer_that_waits_learns_that_the_far_end_is_gone():
    _, _, (_, writer), (_, far_writer) = await connect()
    writer.write(bytes(1 << 20))
    draining = await waits(1.0, writer.drain())
    far_writer.transport.abort()
    await asyncio.wait([draining], timeout=1.0)
    assert draining.done()
    writer.write(b"more")
    with pytest.raises(ConnectionError):
        await writer.drain()


@pytest.mark.parametrize("which", ["writer", "reader"])
@virtual
async def test_streams_of_the_killed_break(which: str):
    one, two, (reader, writer), (far_reader, far_writer) = await connect()
    (one if which == "writer" else two).kill()
    await asyncio.sleep(0.1)
    survivor, pen = (far_reader, far_writer) if which == "writer" else (reader, writer)
    assert await survivor.read() == b""
    pen.write(b"anybody?")
    with pytest.raises(ConnectionError):
        await pen.drain()


@pytest.mark.parametrize("how", ["freeze", "cut"])
@virtual
async def test_what_hangs_arrives_later_and_whole(how: str):
    one, two, (_, writer), (reader, _) = await connect()
    writer.write(b"on its way, ")
    if how == "freeze":
        two.freeze()
    else:
        one.network.cut(one.peer_id, two.peer_id)
    writer.write(b"and held")
    writer.close()
    reading = await waits(30.0, reader.read())
    two.thaw()
    one.network.heal()
    assert await reading == b"on its way, and held"


@virtual
async def test_a_killed_host_behind_a_cut_is_not_noticed():
    one, two, (reader, writer), _ = await connect()
    one.network.cut(two.peer_id)
    two.kill()
    reading = await waits(30.0, reader.read())
    one.network.mend(two.peer_id)
    assert await reading == b""
    writer.close()


@virtual
async def test_streams_that_cannot_be_opened():
    one, two, _, _ = await connect()
    with pytest.raises(NetworkError, match="does not offer"):
        await one.open_stream(two.peer_id, "sing")
    two.freeze()
    begin = asyncio.get_running_loop().time()
    with pytest.raises(NetworkError, match="did not answer"):
        await one.open_stream(two.peer_id, "talk")
    assert asyncio.get_running_loop().time() - begin == pytest.approx(OPEN_STREAM_S)
    two.kill()
    with pytest.raises(UnreachableError):
        await one.open_stream(two.peer_id, "talk")


@virtual
async def test_a_handler_that_returns_closes_its_stream():
    network = MemoryNetwork()
    one, two = network.host(0), network.host(1)

    async def greet(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(b"hello " + peer.encode())

    await two.serve_stream("greet", greet)
    reader, writer = await one.open_stream(two.peer_id, "greet")
    assert await reader.read() == b"hello " + one.peer_id.encode()
    writer.close()
    await asyncio.sleep(0.1)
    assert not one.pipes and not two.pipes
    assert not two.tasks
