"""Streams: what is held back stays with the other side, and a full reader is not made to take more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from p2pllm.averaging.channel import Channel
from p2pllm.averaging.vigil import Vigil, Want
from p2pllm.network.pacing import ON_THE_LINE
from p2pllm.network.streams import Traffic, UnixServer, count, held, open_unix
from p2pllm.testing import MemoryNetwork, virtual


@pytest.mark.parametrize("full", [False, True])
@virtual
async def test_nothing_is_taken_while_a_stream_is_held(full: bool):
    network = MemoryNetwork()
    ann, bob = network.host(0), network.host(1)
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()

    async def accept(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result((reader, writer))
        await asyncio.Event().wait()

    await bob.serve_stream("x", accept)
    _, writer = await ann.open_stream(bob.peer_id, "x")
    reader, answering = await accepted
    if full:  # the reader stops its transport, and nobody else may let it go on
        writer.write(bytes(1 << 20))
        await asyncio.sleep(1)
        assert not answering.transport.is_reading()
    with held(answering):
        assert not answering.transport.is_reading()
        writer.write(b"more")
        await asyncio.sleep(1)
    assert answering.transport.is_reading() != full
    assert (await reader.readexactly((1 << 20) * full + 4)).endswith(b"more")


@pytest.mark.parametrize("direct", [False, True])
async def test_a_limited_machine_receives_no_faster(tmp_path: Path, direct: bool) -> None:
    """Past the reader, too, as large vectors are received. It is a bound from below: a busy machine is only slower."""
    size, traffic = 3_000_000, Traffic()
    traffic.intake.mbit = 80.0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(size))
        await writer.drain()
        await reader.read()

    server = UnixServer(tmp_path / "socket", serve)
    await server.start()
    reader, writer = await open_unix(tmp_path / "socket")
    count(reader, writer, traffic.of("bulk"), 0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    if direct:
        vigil = Vigil(60.0)
        channel = Channel(reader, writer, vigil.wait("a", Want.INPUT), vigil.wait("a", Want.GIVE))
        await channel.take_over()
        await channel.receive_into(memoryview(bytearray(size)))
    else:
        await reader.readexactly(size)
    assert loop.time() - began > 0.5 * size * ON_THE_LINE / 10e6, "some of it at once, as a line may lie idle before"
    assert traffic.received == size
    writer.close()
    await server.close()
