"""Bulk transfers: what arrives is what was sent, within the receiver's bound and the server's."""

# ruff: noqa: ASYNC110 - the loops wait for the server to notice, which it does at once

from __future__ import annotations

import asyncio
import struct
from asyncio import StreamReader, StreamWriter
from typing import Any

import msgpack
import pytest

from p2pllm.errors import NetworkError
from p2pllm.network import bulk
from p2pllm.network.bulk import MAX_OPEN, MAX_OPEN_PER_PEER, PIECE_BYTES, Blob, BulkServer, Fetches, fetch


class Pair:
    """A Transport whose streams go to its own handler, over a socket of this machine."""

    peer_id = "client"

    def __init__(self) -> None:
        self.handler: Any = None
        self.callers = 0
        self.one_peer = False
        self.servers: list[asyncio.Server] = []
        self.writers: list[StreamWriter] = []

    async def serve_stream(self, method: str, handler: Any) -> None:
        self.handler = handler

    async def open_stream(self, peer: str, method: str, expected: int = 0) -> tuple[StreamReader, StreamWriter]:
        self.callers += 1
        caller = "same" if self.one_peer else f"caller-{self.callers}"

        async def handle(reader: StreamReader, writer: StreamWriter) -> None:
            try:
                await self.handler(caller, reader, writer)
            finally:
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        self.servers.append(server)
        ends = await asyncio.open_connection(*server.sockets[0].getsockname())
        self.writers.append(ends[1])
        return ends

    async def close(self) -> None:
        for writer in self.writers:
            writer.close()
        for server in self.servers:
            server.close()


@pytest.fixture
async def pair():
    pair = Pair()
    yield pair
    await pair.close()


async def serve(pair: Pair, blob: Blob | None) -> BulkServer:
    async def source(request: dict[str, Any]) -> Blob | None:
        return blob

    server = BulkServer(pair, source)
    await server.start()
    return server


@pytest.mark.parametrize("sizes", [[], [0], [1], [PIECE_BYTES], [3, PIECE_BYTES + 1, 5]])
async def test_what_is_served_arrives(pair: Pair, sizes: list[int]):
    buffers = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    await serve(pair, Blob({"a": 1}, [memoryview(buffer) for buffer in buffers]))
    got = await fetch(pair, "server", {"what": "x"}, sum(sizes))
    assert got == ({"a": 1}, bytearray(b"".join(buffers)))


async def test_what_is_not_there_is_none(pair: Pair):
    await serve(pair, None)
    assert await fetch(pair, "server", {}, 10) is None


async def test_who_serves_nothing_for_now_breaks_off(pair: Pair):
    """That it has nothing would be an answer, which others take for the truth."""

    async def refuse(request: dict[str, Any]) -> Blob | None:
        raise ConnectionRefusedError("not now")

    await BulkServer(pair, refuse).start()
    with pytest.raises(NetworkError, match="broke off"):
        await fetch(pair, "server", {}, 10)


async def test_a_stream_carries_one_fetch_after_the_other(pair: Pair):
    await serve(pair, Blob({"a": 1}, [b"fine"]))
    fetches = Fetches(pair)
    assert [await fetches.fetch("server", {}, 10) for _ in range(3)] == 3 * [({"a": 1}, bytearray(b"fine"))]
    assert pair.callers == 1
    await asyncio.gather(*(fetches.fetch("server", {}, 10) for _ in range(3)))
    await asyncio.gather(*(fetches.fetch("server", {}, 10) for _ in range(3)))
    assert pair.callers == 3
    with pytest.raises(NetworkError, match="announced"):
        await fetches.fetch("server", {}, 3)
    await asyncio.gather(*(fetches.fetch("server", {}, 10) for _ in range(3)))
    assert pair.callers == 4, "what follows on a stream that was broken off cannot be told"
    fetches.close()
    await fetches.fetch("server", {}, 10)
    assert pair.callers == 5
    fetches.close()


@pytest.mark.parametrize("known", [True, False])
async def test_a_stream_that_was_closed_for_want_of_requests_costs_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, known: bool
):
    server = await serve(pair, None)
    fetches = Fetches(pair)
    monkeypatch.setattr(bulk, "REQUEST_TIMEOUT_S", 0.05)
    assert await fetches.fetch("server", {}, 10) is None
    (stream,) = fetches._unused["server", False]
    while server._open or (known and not stream[0].at_eof()):
        await asyncio.sleep(0.01)
    monkeypatch.undo()
    assert await fetches.fetch("server", {}, 10) is None
    assert pair.callers == 2
    assert stream not in fetches._unused["server", False]
    fetches.close()


async def test_more_than_the_bound_is_not_taken(pair: Pair):
    await serve(pair, Blob({}, [bytes(11)]))
    with pytest.raises(NetworkError, match="announced 11 bytes where at most 10"):
        await fetch(pair, "server", {}, 10)


FRAME = struct.Struct("!I")
GOOD = msgpack.packb({"found": True})


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0",
        FRAME.pack(1 << 31),
        FRAME.pack(3) + b"\xc1\xc1\xc1",
        FRAME.pack(1) + b"\x01",
        FRAME.pack(len(GOOD)) + GOOD,
        FRAME.pack(len(GOOD)) + GOOD + struct.pack("!Q", 5) + b"1234",
    ],
)
async def test_nonsense_raises_network_error(pair: Pair, answer: bytes):
    async def handler(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await writer.drain()

    await pair.serve_stream("fetch", handler)
    with pytest.raises(NetworkError, match="broke off"):
        await fetch(pair, "server", {}, 10)


@pytest.mark.parametrize("request_", [b"", FRAME.pack(1 << 31), FRAME.pack(2) + b"\xc1\xc1", FRAME.pack(1) + b"\x01"])
async def test_a_bad_request_ends_its_stream_alone(pair: Pair, request_: bytes):
    server = await serve(pair, Blob({}, [b"fine"]))
    reader, writer = await pair.open_stream("server", "fetch")
    writer.write(request_)
    writer.write_eof()
    assert await reader.read() == b""
    assert await fetch(pair, "server", {}, 10) == ({}, bytearray(b"fine"))
    while server._open:
        await asyncio.sleep(0)


@pytest.mark.parametrize(("one_peer", "bound"), [(True, MAX_OPEN_PER_PEER), (False, MAX_OPEN)])
async def test_open_fetches_are_bounded(pair: Pair, one_peer: bool, bound: int):
    server = await serve(pair, Blob({}, [b"fine"]))
    pair.one_peer = one_peer
    waiting = [await pair.open_stream("server", "fetch") for _ in range(bound)]
    while server._open.total() < bound:
        await asyncio.sleep(0)
    with pytest.raises(NetworkError):
        await fetch(pair, "server", {}, 10)
    for _, writer in waiting:
        writer.close()
    while server._open:
        await asyncio.sleep(0)
    assert await fetch(pair, "server", {}, 10) is not None


async def test_a_server_that_stalls_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bulk, "STALL_TIMEOUT_S", 0.05)

    async def handler(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.read()

    await pair.serve_stream("fetch", handler)
    with pytest.raises(NetworkError, match="stalled"):
        await fetch(pair, "server", {}, 10)


async def test_slow_is_not_stalled(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bulk, "STALL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(bulk, "SLOWEST_BYTES_PER_S", 1)

    async def handler(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(FRAME.pack(len(GOOD)) + GOOD + struct.pack("!Q", 8))
        for number in range(8):
            await asyncio.sleep(0.05)
            writer.write(bytes([number]))

    await pair.serve_stream("fetch", handler)
    assert await fetch(pair, "server", {}, 8) == ({}, bytearray(range(8)))


async def test_a_reader_that_stalls_frees_its_slot(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bulk, "STALL_TIMEOUT_S", 0.05)
    server = await serve(pair, Blob({}, [bytes(64 << 20)]))
    _, writer = await pair.open_stream("server", "fetch")
    writer.write(FRAME.pack(1) + b"\x80")
    while not server._open:
        await asyncio.sleep(0)
    while server._open:
        await asyncio.sleep(0.01)
    assert not server._slots.locked()
