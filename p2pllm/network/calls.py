"""Calls: requests and replies with a peer over one lasting stream, opened by whoever calls.

p2pd has calls of its own and opens a stream for each: some ten packets for a heartbeat, more than its content. On a
stream that stays open a request and its reply are three. Requests are answered at the same time and replied to in any
order. What does not live here: opening streams (`node`, which has the time-outs, too), and what calls say.

A frame is, big-endian: kind (uint8), number of the call (uint32), length (uint32) and so many bytes. A request holds
the length of the method's name (uint8), the name and the payload; a reply its payload; a failure a sentence; a
cancellation nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import struct
from asyncio import Future, StreamReader, StreamWriter, Task
from collections import Counter
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.network.transport import MAX_CALL_BYTES, CallHandler
from p2pllm.network.wire import one_line, short

log = logging.getLogger(__name__)

METHOD = "calls"
"""The streams' own method."""

MAX_BUSY, MAX_BUSY_PER_PEER = 1024, 64
"""Calls that are answered at the same time, and those of one peer among them; further ones are refused."""

MAX_LINES_PER_PEER = 16
"""Streams of one peer that are served; it needs one, and more only while old ones break."""

UNUSED_S = 30.0
"""Who opened a stream closes it when it had no call for this long."""

ABANDONED_S = 120.0
"""Who serves a stream closes it after this long without a word."""

SILENT_S = 2.0
"""A call that was given up after this long without a byte from the peer takes its stream with it: what has become of a
connection shows on a new stream, for which p2pd uses the best connection that there is."""

_STALL_S = 20.0
"""A peer that takes no replies for this long is no longer served."""

_FRAME = struct.Struct("!BII")
_REQUEST, _REPLY, _FAILURE, _CANCEL = range(4)
_MAX_FRAME = MAX_CALL_BYTES + 256

Open = Callable[[str], Awaitable[tuple[StreamReader, StreamWriter]]]
"""Peer id -> a new stream to it; raises NetworkError."""


class Calls:
    """Both sides of all calls of a node."""

    def __init__(self, open_stream: Open) -> None:
        self._open = open_stream
        self._handlers: dict[str, CallHandler] = {}
        self._lines: dict[str, _Line] = {}
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._served: Counter[str] = Counter()  # streams, by peer
        self._busy: Counter[str] = Counter()  # calls that are answered, by peer

    def serve(self, method: str, handler: CallHandler) -> None:
        """Answer calls of `method`, a name of at most 255 bytes."""
        self._handlers[method] = handler

    async def call(self, peer: str, method: str, payload: bytes) -> bytes:
        """Ask a peer; without a time-out of its own. Raises UnreachableError where nobody is there (any more), and
        NetworkError where the peer fails to answer.
        """
        line = self._lines.get(peer)
        if line is None or not line.is_open:
            line = await self._opened(peer)
        return await line.call(method, payload)

    async def _opened(self, peer: str) -> _Line:
        """A new line, or the one that somebody else opened meanwhile."""
        lock = self._opening.setdefault(peer, asyncio.Lock())
        async with lock:
            line = self._lines.get(peer)
            if line is None or not line.is_open:
                line = _Line(peer, *await self._open(peer), self._forget)
                self._lines[peer] = line
            return line

    def _forget(self, line: _Line) -> None:
        if self._lines.get(line.peer) is line:
            del self._lines[line.peer]

    async def close(self, reason: str) -> None:
        """Fail the calls in flight with NetworkError; later ones open new streams."""
        await asyncio.gather(*(line.close(reason) for line in list(self._lines.values())))

    # -- answering -------------------------------------------------------------------------------------------

    async def accept(self, peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        """Serve a stream that a peer opened, until either side ends it. Never raises for what the peer does."""
        if self._served[peer] >= MAX_LINES_PER_PEER:
            return
        self._served[peer] += 1
        answering: dict[int, Task[None]] = {}
        try:
            while True:
                async with asyncio.timeout(ABANDONED_S):
                    kind, number, body = await _read(reader)
                if kind == _CANCEL:
                    if number in answering:
                        answering[number].cancel()
                elif kind != _REQUEST or number in answering:
                    raise ValueError("a frame that makes no sense")
                elif self._busy.total() >= MAX_BUSY or self._busy[peer] >= MAX_BUSY_PER_PEER:
                    _write(writer, _FAILURE, number, b"too many calls at once")
                else:
                    task = answering[number] = asyncio.create_task(self._answer(peer, number, body, writer))
                    self._busy[peer] += 1
                    task.add_done_callback(functools.partial(self._answered, peer, number, answering))
                await _drain(writer)  # who takes no replies is not heard, either
        except (TimeoutError, OSError, EOFError, ValueError) as error:
            log.debug("calls of %s ended: %s", short(peer), str(error) or "silence")
            writer.transport.abort()  # a close would wait until all replies are taken
        finally:
            for task in answering.values():
                task.cancel()
            _release(self._served, peer)

    async def _answer(self, peer: str, number: int, body: bytes, writer: StreamWriter) -> None:
        kind, end = _REPLY, 1 + int.from_bytes(body[:1])
        method = one_line(body[1:end].decode(errors="replace"))
        try:
            handler = self._handlers.get(method)
            if handler is None:
                raise NetworkError("it does not offer this; it is starting, stopping or runs another version")
            payload = body[end:]
            if len(payload) > MAX_CALL_BYTES:
                raise NetworkError(f"{len(payload)} bytes are too many")
            reply = await handler(peer, payload)
            if len(reply) > MAX_CALL_BYTES:
                raise NetworkError(f"the reply to {method} has {len(reply)} bytes")
        except Exception as error:
            log.debug("a call of %s failed", method, exc_info=True)
            kind, reply = _FAILURE, f"{type(error).__name__}: {error}".encode()[:200]
        _write(writer, kind, number, reply)
        with contextlib.suppress(TimeoutError, OSError):  # counts as a call under way until its reply is taken
            await _drain(writer)

    def _answered(self, peer: str, number: int, answering: dict[int, Task[None]], _: Task[None]) -> None:
        del answering[number]
        _release(self._busy, peer)


class _Line:
    """A stream that we opened, with the calls that are under way on it."""

    def __init__(self, peer: str, reader: StreamReader, writer: StreamWriter, on_end: Callable[[_Line], None]) -> None:
        self.peer = peer
        self.is_open = True  # takes further calls
        self._reader, self._writer, self._on_end = reader, writer, on_end
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[bytes]] = {}
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._used_at = self._loop.time()
        self._reading = asyncio.create_task(self._read())
        self._timer = self._loop.call_later(UNUSED_S, self._close_unused)

    async def call(self, method: str, payload: bytes) -> bytes:
        if self._reading.done():
            raise self._lost()
        number = next(self._numbers) % (1 << 32)
        future: Future[bytes] = self._loop.create_future()
        self._waiting[number] = future
        asked_at = self._used_at = self._loop.time()
        name = method.encode()
        try:
            _write(self._writer, _REQUEST, number, bytes([len(name)]), name, payload)
            with contextlib.suppress(OSError):  # its end is noticed by the reading task, which has the reason
                await self._writer.drain()
            return await future
        except asyncio.CancelledError:
            self._give_up(number, asked_at)
            raise
        finally:
            del self._waiting[number]
            if future.done() and not future.cancelled():
                future.exception()  # marks it as seen where we were cancelled at the same moment
            if not self.is_open and not self._waiting:
                self._reading.cancel()

    def _give_up(self, number: int, asked_at: float) -> None:
        if self._writer.is_closing():
            return
        _write(self._writer, _CANCEL, number)
        if self._heard_at < asked_at and self._loop.time() - asked_at >= SILENT_S:
            self._retire()

    def _retire(self) -> None:
        """Take no further calls; end with the last one that is under way."""
        self.is_open = False
        self._on_end(self)

    async def _read(self) -> None:
        try:
            while True:
                kind, number, body = await _read(self._reader)
                self._heard_at = self._loop.time()
                future = self._waiting.get(number)
                if future is None or future.done():  # it was given up
                    continue
                if kind == _REPLY and len(body) <= MAX_CALL_BYTES:
                    future.set_result(body)
                elif kind == _FAILURE:
                    text = one_line(body.decode(errors="replace"))
                    future.set_exception(NetworkError(f"Peer {short(self.peer)} failed to answer: {text}."))
                else:
                    raise ValueError(f"a reply of kind {kind} and {len(body)} bytes")
        except (OSError, EOFError, ValueError) as error:
            log.debug("the calls' stream to %s ended: %s", short(self.peer), error)
        finally:
            self._timer.cancel()
            self._retire()
            self._fail(self._lost())
            self._writer.close()

    def _close_unused(self) -> None:
        unused_s = 0.0 if self._waiting else self._loop.time() - self._used_at
        if unused_s >= UNUSED_S:
            self._reading.cancel()
        else:
            self._timer = self._loop.call_later(UNUSED_S - unused_s, self._close_unused)

    async def close(self, reason: str) -> None:
        self._fail(NetworkError(reason))
        self._reading.cancel()
        await asyncio.wait([self._reading])

    def _lost(self) -> UnreachableError:
        return UnreachableError(f"The connection to peer {short(self.peer)} was lost.")

    def _fail(self, error: NetworkError) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)


def _write(writer: StreamWriter, kind: int, number: int, *body: bytes) -> None:
    writer.write(b"".join([_FRAME.pack(kind, number, sum(map(len, body))), *body]))


async def _drain(writer: StreamWriter) -> None:
    """Raises TimeoutError, OSError."""
    async with asyncio.timeout(_STALL_S):
        await writer.drain()


async def _read(reader: StreamReader) -> tuple[int, int, bytes]:
    """The next frame. Raises EOFError, OSError, and ValueError for one that is too long."""
    kind, number, length = _FRAME.unpack(await reader.readexactly(_FRAME.size))
    if length > _MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return kind, number, await reader.readexactly(length)


def _release(counter: Counter[str], peer: str) -> None:
    counter[peer] -= 1
    if not counter[peer]:
        del counter[peer]
