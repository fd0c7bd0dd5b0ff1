"""Streams: what is held back stays with the other side, and a full reader is not made to take more."""

from __future__ import annotations

import asyncio

import pytest

from p2pllm.network.streams import held
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
