"""Calls over lasting streams: replies find their calls, whatever becomes of streams, callers and handlers."""

from __future__ import annotations

import asyncio
import struct
from asyncio import StreamReader, StreamWriter, Task

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.network.calls import (
    ABANDONED_S,
    MAX_BUSY,
    MAX_BUSY_PER_PEER,
    MAX_LINES_PER_PEER,
    METHOD,
    SILENT_S,
    UNUSED_S,
    Calls,
)
from p2pllm.network.transport import MAX_CALL_BYTES
from p2pllm.testing import MemoryHost, MemoryNetwork, virtual

FRAME = struct.Struct("!BII")
REQUEST, REPLY, FAILURE = range(3)


class Side:
    """One of two hosts, with its calls; `opened` counts its streams."""

    def __init__(self, host: MemoryHost) -> None:
        self.host = host
        self.opened = 0
        self.calls = Calls(self._open)

    async def _open(self, peer: str) -> tuple[StreamReader, StreamWriter]:
        self.opened += 1
        return await self.host.open_stream(peer, METHOD)

    async def call(self, other: Side, method: str, payload: bytes = b"", timeout: float = 4.0) -> bytes:
        async with asyncio.timeout(timeout):
            return await self.calls.call(other.host.peer_id, method, payload)

    def begin(self, other: Side, method: str, payload: bytes = b"", timeout: float = 60.0) -> Task[bytes]:
        return asyncio.create_task(self.call(other, method, payload, timeout))


async def echo(peer: str, payload: bytes) -> bytes:
    return peer.encode() + payload


async def late(peer: str, payload: bytes) -> bytes:
    await asyncio.sleep(float(payload))
    return payload


async def fails(peer: str, payload: bytes) -> bytes:
    raise RuntimeError("broken\ninside " * 100)


async def large(peer: str, payload: bytes) -> bytes:
    return bytes(int(payload))


async def make_pair() -> tuple[Side, Side]:
    network = MemoryNetwork(latency_s=0.01)
    sides = Side(network.host(0)), Side(network.host(1))
    for side in sides:
        for handler in (echo, late, fails, large):
            side.calls.serve(handler.__name__, handler)
        await side.host.serve_stream(METHOD, side.calls.accept)
    return sides


async def raw_stream(ann: Side, bob: Side) -> tuple[StreamReader, StreamWriter]:
    """One on which the test writes frames itself."""
    return await ann.host.open_stream(bob.host.peer_id, METHOD)


def request(number: int, method: bytes, payload: bytes = b"") -> bytes:
    body = bytes([len(method)]) + method + payload
    return FRAME.pack(REQUEST, number, len(body)) + body


@virtual
async def test_replies_find_their_calls_on_one_stream():
    ann, bob = await make_pair()
    tasks = [ann.begin(bob, "late", b"%d" % seconds) for seconds in (3, 1, 2)]
    assert await ann.call(bob, "echo", b"hi") == ann.host.peer_id.encode() + b"hi"
    assert [await task for task in tasks] == [b"3", b"1", b"2"]
    assert await bob.call(ann, "echo") == bob.host.peer_id.encode()
    assert (ann.opened, bob.opened) == (1, 1)


@virtual
async def test_callers_that_come_at_once_share_a_stream():
    ann, bob = await make_pair()
    tasks = [ann.begin(bob, "echo", b"%d" % number) for number in range(50)]
    assert len({await task for task in tasks}) == 50
    assert ann.opened == 1


@virtual
async def test_errors_are_sentences():
    ann, bob = await make_pair()
    with pytest.raises(NetworkError, match="RuntimeError: broken inside") as caught:
        await ann.call(bob, "fails")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    with pytest.raises(NetworkError, match="does not offer"):
        await ann.call(bob, "missing")
    with pytest.raises(NetworkError, match=f"reply to large has {MAX_CALL_BYTES + 1} bytes"):
        await ann.call(bob, "large", b"%d" % (MAX_CALL_BYTES + 1))
    with pytest.raises(NetworkError, match="too many"):
        await ann.call(bob, "echo", bytes(MAX_CALL_BYTES + 1))
    assert len(await ann.call(bob, "large", b"%d" % MAX_CALL_BYTES)) == MAX_CALL_BYTES
    assert ann.opened == 1


@virtual
async def test_who_gives_up_ends_the_handler_and_harms_nobody():
    ann, bob = await make_pair()
    ended = asyncio.Event()

    async def waits(peer: str, payload: bytes) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return b""

    bob.calls.serve("waits", waits)
    with pytest.raises(TimeoutError):
        await ann.call(bob, "waits", timeout=1.0)
    await ended.wait()
    # the reply is on its way when the caller gives up
    with pytest.raises(TimeoutError):
        await ann.call(bob, "echo", timeout=0.015)
    assert await ann.call(bob, "echo") == ann.host.peer_id.encode()
    assert ann.opened == 1


@virtual
async def test_a_lost_connection_fails_what_waits_and_the_next_call_dials():
    ann, bob = await make_pair()
    waiting = ann.begin(bob, "late", b"50")
    assert await ann.call(bob, "echo")
    bob.host.kill()
    with pytest.raises(UnreachableError, match="was lost"):
        await waiting
    with pytest.raises(UnreachableError):
        await ann.call(bob, "echo")
    again = Side(ann.host.network.host(1))
    again.calls.serve("echo", echo)
    await again.host.serve_stream(METHOD, again.calls.accept)
    assert await ann.call(again, "echo") == ann.host.peer_id.encode()


@virtual
async def test_a_silent_stream_is_left_for_a_new_one():
    """A frozen peer answers again on a new stream; one that is merely slow to answer keeps its stream."""
    ann, bob = await make_pair()
    assert await ann.call(bob, "echo")
    bob.host.freeze()
    with pytest.raises(TimeoutError):
        await ann.call(bob, "echo", timeout=SILENT_S / 2)
    assert ann.opened == 1
    with pytest.raises(TimeoutError):
        await ann.call(bob, "echo", timeout=SILENT_S * 2)
    bob.host.thaw()
    assert await ann.call(bob, "echo")
    assert ann.opened == 2
    slow = ann.begin(bob, "late", b"9", timeout=SILENT_S * 2)
    await asyncio.sleep(SILENT_S)
    assert await ann.call(bob, "echo")
    with pytest.raises(TimeoutError):
        await slow
    assert await ann.call(bob, "echo")
    assert ann.opened == 2


@virtual
async def test_unused_streams_are_closed_by_both_sides():
    ann, bob = await make_pair()
    assert await ann.call(bob, "echo")
    assert await ann.call(bob, "late", b"%f" % (2 * UNUSED_S), timeout=3 * UNUSED_S)
    assert ann.opened == 1, "a stream with a call under way is in use"
    await asyncio.sleep(UNUSED_S + 1)
    assert not ann.host.pipes and not bob.host.pipes
    assert await ann.call(bob, "echo")
    assert ann.opened == 2
    reader, _ = await raw_stream(ann, bob)
    async with asyncio.timeout(ABANDONED_S + 1):
        assert await reader.read() == b""


@virtual
async def test_closing_fails_what_waits():
    ann, bob = await make_pair()
    waiting = ann.begin(bob, "late", b"50")
    assert await ann.call(bob, "echo")
    await ann.calls.close("p2pd has stopped.")
    with pytest.raises(NetworkError, match="p2pd has stopped"):
        await waiting
    assert not ann.host.pipes
    assert await ann.call(bob, "echo"), "on a new stream"


@virtual
async def test_a_peer_has_so_many_calls_and_streams_and_others_theirs():
    ann, bob = await make_pair()
    tasks = [ann.begin(bob, "late", b"5") for _ in range(MAX_BUSY_PER_PEER + 1)]
    done = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in done if isinstance(result, NetworkError)]
    assert len(refused) == 1 and "too many calls at once" in str(refused[0])
    streams = [await raw_stream(ann, bob) for _ in range(MAX_LINES_PER_PEER)]  # one more than it may have
    assert await streams[-1][0].read() == b""
    eve = Side(ann.host.network.host(2))
    assert await eve.call(bob, "echo") == eve.host.peer_id.encode()
    assert await ann.call(bob, "echo") == ann.host.peer_id.encode()
    assert MAX_BUSY > MAX_BUSY_PER_PEER


@virtual
@pytest.mark.parametrize(
    "frame",
    [
        FRAME.pack(REQUEST, 1, MAX_CALL_BYTES + 1000),
        FRAME.pack(REPLY, 1, 0),
        FRAME.pack(99, 1, 0),
        2 * request(7, b"late", b"9"),
    ],
)
async def test_nonsense_ends_a_stream_of_strangers(frame):
    ann, bob = await make_pair()
    reader, writer = await raw_stream(ann, bob)
    writer.write(frame)
    async with asyncio.timeout(1):
        assert await reader.read() == b""
    assert await ann.call(bob, "echo")


@virtual
@pytest.mark.parametrize("kind", [REQUEST, FAILURE + 1, 200])
async def test_nonsense_instead_of_a_reply_is_a_lost_connection(kind):
    ann, bob = await make_pair()

    async def babbles(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        _, number, length = FRAME.unpack(await reader.readexactly(FRAME.size))
        await reader.readexactly(length)
        writer.write(FRAME.pack(REPLY, number + 1, 3) + b"abc")  # of a call that nobody made
        writer.write(FRAME.pack(kind, number, 0))
        await reader.read()

    await bob.host.serve_stream(METHOD, babbles)
    with pytest.raises(UnreachableError, match="was lost"):
        await ann.call(bob, "echo")


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_or_the_end(data: bytes):
    @virtual
    async def feed() -> None:
        ann, bob = await make_pair()
        reader, writer = await raw_stream(ann, bob)
        writer.write(data + request(3, b"\xff\xfe"))
        async with asyncio.timeout(2 * ABANDONED_S):
            await reader.read()
        assert await ann.call(bob, "echo")

    feed()


@virtual
async def test_who_takes_no_replies_stops_being_heard():
    ann, bob = await make_pair()
    _, writer = await raw_stream(ann, bob)
    for number in range(MAX_BUSY_PER_PEER):
        writer.write(request(number, b"large", b"%d" % MAX_CALL_BYTES))
    await asyncio.sleep(ABANDONED_S + 1)
    assert not bob.host.pipes
