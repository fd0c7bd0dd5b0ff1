"""Channel: one stream with exact reads into the caller's memory, and a record of who keeps us waiting.

A StreamReader costs three copies and an allocation a read. Where the stream stands on a socket, a Channel
puts a BufferedProtocol under it, with asyncio's public `set_protocol`, and the kernel writes into the array
itself; under TLS it is decrypted into the array, as far as it fits. Streams without a socket (those of tests) are read
the ordinary way. What does not live here: what the bytes mean, and whom to blame.
"""

from __future__ import annotations

import asyncio
import socket
import weakref
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from contextlib import suppress

from p2pllm.averaging.vigil import Wait
from p2pllm.network.streams import limits_intake, limits_upload, pace, take_it_slowly

CHUNK_BYTES = 256 * 1024
"""Bytes handed to a writer at a time: a socket takes most of it at once, so that little is copied."""

PACED_BYTES = 64 * 1024
"""The same where this machine sends or receives no faster than a set rate."""

CLOSE_S = 30.0
"""Time in which the other side may read the last of what was sent."""

_REFUSAL_SECONDS = 1.0
_RECORD_BYTES = 16 * 1024  # that TLS decrypts at once


class Channel:
    """Exact reads and bounded writes on one stream; at most one reader and one writer at a time."""

    def __init__(self, reader: StreamReader, writer: StreamWriter, receiving: Wait, sending: Wait) -> None:
        self.peer = receiving.peer
        self.receiving = receiving
        self.sending = sending
        self.sent = 0
        self.received = 0
        self._reader = reader
        self._writer = writer
        self._rest = memoryview(b"")
        self._direct: _SocketProtocol | _TlsProtocol | None = None
        _widen(writer)

    async def take_over(self) -> None:
        """Read straight from the socket from now on, if there is one; no read may be under way."""
        transport = self._writer.transport
        if not isinstance(transport, asyncio.Transport) or transport.is_closing():
            return
        if self._writer.get_extra_info("socket") is None:
            return
        # A reader that counts for its node does not see what goes past it.
        hand_over = getattr(self._reader, "hand_over", lambda: lambda count: None)
        kind = _TlsProtocol if transport.get_extra_info("sslcontext") else _SocketProtocol
        direct = kind(transport, self.receiving, hand_over())
        transport.set_protocol(direct)
        # What the reader holds already comes first; with the end fed, read() returns just that, and at once.
        self._reader.feed_eof()
        self._rest = memoryview(await self._reader.read())
        direct.pause()
        self._direct = direct

    async def receive_into(self, view: memoryview) -> None:
        """Fill `view`, bytes. Raises ConnectionError if the stream ends before."""
        with self.receiving.waiting():
            at = min(len(self._rest), len(view))
            view[:at] = self._rest[:at]
            self._rest = self._rest[at:]
            if at < len(view) and self._direct is None:
                await self._read_into(view[at:])
                at = len(view)
        size = PACED_BYTES if limits_intake(self._reader) else len(view)
        for start in range(at, len(view), max(1, size)):
            await self._fill(view[start : start + size])
        self.received += len(view)

    async def _fill(self, view: memoryview) -> None:
        assert self._direct is not None  # noqa: S101 - the caller looked
        with self.receiving.waiting():
            await self._direct.fill(view)
        await take_it_slowly(self._reader)  # for which the other side is not to blame

    async def _read_into(self, view: memoryview) -> None:
        at = 0
        while at < len(view):
            data = await self._reader.read(min(len(view) - at, CHUNK_BYTES))
            if not data:
                raise ConnectionResetError("The stream ended early.")
            view[at : at + len(data)] = data
            at += len(data)
            self.receiving.touch()

    async def ended(self) -> bool:
        """Wait until the other side closes; False if bytes come instead."""
        try:
            await self.receive_into(memoryview(bytearray(1)))
        except ConnectionError:
            return True
        return False

    async def send(self, data: memoryview | bytes) -> None:
        """Hand `data` to the stream, waiting while it is full. Raises ConnectionError if it is gone."""
        view = memoryview(data)
        for at in range(0, len(view), CHUNK_BYTES):
            await self.put(view[at : at + CHUNK_BYTES])
            await self.flush()

    async def put(self, data: memoryview) -> None:
        """Queue `data` as soon as this machine may send it; `flush` must follow before much more."""
        size = PACED_BYTES if limits_upload(self._writer) else len(data)
        for at in range(0, len(data), max(1, size)):
            piece = data[at : at + size]
            await pace(self._writer, len(piece))  # for which the other side is not to blame
            self._writer.write(piece)
            self.sent += len(piece)

    async def flush(self) -> None:
        """Wait until the stream takes more. Raises ConnectionError if it is gone."""
        with self.sending.waiting():
            await self._writer.drain()
            self.sending.touch()

    def close(self) -> None:
        """Close once what was sent has left, or in CLOSE_S seconds; does not wait."""
        self._writer.close()
        asyncio.get_running_loop().call_later(CLOSE_S, _abort, weakref.ref(self._writer.transport))

    def abort(self) -> None:
        """Close now and drop what has not left."""
        _abort(weakref.ref(self._writer.transport))


def _abort(transport: weakref.ref[asyncio.WriteTransport]) -> None:
    with suppress(AttributeError):  # it is gone, or asyncio's own: one that was closing and sent all forgot its loop
        transport().abort()  # type: ignore[union-attr]


def _widen(writer: StreamWriter) -> None:
    """Let whole chunks go from the array to the socket.

    What a socket does not take at once asyncio copies to a buffer of its own. So wait until that buffer is
    empty, and let the socket take a chunk; on TCP the kernel itself knows best.
    """
    sock = writer.get_extra_info("socket")
    if sock is None:
        return
    # TLS, which looks at its buffer only when something is written, would wait for ever with 0
    writer.transport.set_write_buffer_limits(high=1 if writer.get_extra_info("sslcontext") else 0)
    if sock.family == socket.AF_UNIX:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK_BYTES)  # Linux doubles it


class _Direct(asyncio.BaseProtocol):
    """Has what comes written into the array that `fill` names, and has nothing read otherwise."""

    def __init__(self, transport: asyncio.Transport, receiving: Wait, report: Callable[[int], None]) -> None:
        self._transport = transport
        self._report = report
        self._receiving = receiving
        # The StreamWriter's drain() and wait_closed() live in the stream's own protocol: it must hear, too.
        self._below = transport.get_protocol()
        self._target = memoryview(b"")
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    async def fill(self, view: memoryview) -> None:
        """Raises ConnectionResetError if the stream ends before."""
        if self._ended or self._transport.is_closing():
            raise ConnectionResetError("The stream ended early.")
        self._target = view
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.resume_reading()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._target = memoryview(b"")
            self.pause()

    def pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _came(self, nbytes: int) -> None:
        """So many bytes are in the array."""
        self._target = self._target[nbytes:]
        self._receiving.touch()
        if not self._target:
            # At once, not when the waiter wakes: the loop may look at the socket again before that.
            self.pause()
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._below.connection_lost(exc)

    def pause_writing(self) -> None:
        self._below.pause_writing()

    def resume_writing(self) -> None:
        self._below.resume_writing()

    def _end(self) -> None:
        self._ended = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionResetError("The stream ended early."))


class _SocketProtocol(_Direct, asyncio.BufferedProtocol):
    """The kernel writes into the array."""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target

    def buffer_updated(self, nbytes: int) -> None:
        self._report(nbytes)
        self._came(nbytes)

    def eof_received(self) -> bool:
        self._end()
        return True  # the other direction goes on


class _TlsProtocol(_Direct, asyncio.BufferedProtocol):
    """Takes all that waits to be decrypted, into the array or, where that is shorter, into a buffer of its own first.

    Once the other side's end has come, asyncio asks for room a single time and drops what does not fit.
    """

    def __init__(self, transport: asyncio.Transport, receiving: Wait, report: Callable[[int], None]) -> None:
        super().__init__(transport, receiving, report)
        self._between = bytearray()
        self._lent = False  # the buffer, not the array
        self._spare = memoryview(b"")  # came, but no array was there for it

    async def fill(self, view: memoryview) -> None:
        at = min(len(self._spare), len(view))
        view[:at] = self._spare[:at]
        self._spare = self._spare[at:]
        if at < len(view):
            await super().fill(view[at:])

    def get_buffer(self, sizehint: int) -> memoryview:
        room = max(0, sizehint) + _RECORD_BYTES  # of a record that was begun, which the hint does not count
        self._lent = room > len(self._target)
        if not self._lent:
            return self._target
        if len(self._between) < room:
            self._between = bytearray(room)
        return memoryview(self._between)

    def buffer_updated(self, nbytes: int) -> None:
        self._report(nbytes)
        at = nbytes
        if self._lent:
            at = min(nbytes, len(self._target))
            self._target[:at] = memoryview(self._between)[:at]
            self._spare = memoryview(self._between)[at:nbytes]  # nothing is read while there is some
        self._came(at)

    def eof_received(self) -> bool:
        self._end()
        return False  # TLS has no half-closed state


async def refuse(answer: bytes, reader: StreamReader, writer: StreamWriter) -> None:
    """Answer, and let the other side close: a stream closed with unread bytes may lose the answer."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_REFUSAL_SECONDS):
            writer.write(answer)
            await writer.drain()
            while await reader.read(CHUNK_BYTES):
                pass
