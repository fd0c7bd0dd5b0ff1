"""Counted streams over sockets: asyncio's readers and writers with a larger buffer and a byte count.

What lives here: the two stream classes, opening and accepting them, and the counters. What does not: the
messages that p2pd expects at the start of a stream (`control`), and TLS (`direct`).
"""

from __future__ import annotations

import asyncio
import math
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from p2pllm.network.pacing import Pacer

READ_LIMIT = 4 << 20
"""Bytes; a reader pauses its socket at twice this. 1.25 times the bulk rate of asyncio's 64 KiB."""

WRITE_LIMIT = 1 << 20
"""Bytes; `drain` waits while more than this lies unsent."""

MAX_PEERS = 256
"""Peers whose bytes are counted for themselves."""

_CANCEL_S = 0.5
"""A handler that does not end when it is cancelled is left behind."""

Accept = Callable[[Any, Any], Awaitable[None]]
"""(reader, writer), both counted"""


@dataclass
class Moved:
    """Bytes both ways."""

    sent: int = 0
    received: int = 0
    pacer: Pacer | None = field(default=None, repr=False, compare=False)  # of what is sent
    intake: Pacer | None = field(default=None, repr=False, compare=False)  # of what is received


@dataclass
class Traffic:
    """Payload bytes since the node was started, without the framing of p2pd and TCP.

    calls: all calls, the DHT's among them. streams: all others, by protocol. peers: these again, by peer, of the peers
    that were met last. pacer, intake: of what they send and receive together.
    """

    calls: Moved = field(default_factory=Moved)
    streams: dict[str, Moved] = field(default_factory=dict)
    peers: dict[str, Moved] = field(default_factory=dict)
    pacer: Pacer = field(default_factory=lambda: Pacer(0.0))
    intake: Pacer = field(default_factory=lambda: Pacer(0.0))

    def of(self, proto: str) -> Moved:
        """The streams of one protocol; only protocols that we open or serve get here."""
        if proto.endswith("/calls"):
            return self.calls
        return self.streams.setdefault(proto, Moved(pacer=self.pacer, intake=self.intake))

    def with_(self, peer: str) -> Moved:
        """The streams with one peer."""
        moved = self.peers.pop(peer, None) or Moved()
        self.peers[peer] = moved
        if len(self.peers) > MAX_PEERS:
            del self.peers[next(iter(self.peers))]
        return moved

    @property
    def sent(self) -> int:
        """All that was sent."""
        return self.calls.sent + sum(moved.sent for moved in self.streams.values())

    @property
    def received(self) -> int:
        """All that was received."""
        return self.calls.received + sum(moved.received for moved in self.streams.values())


class CountedReader(StreamReader):
    """A StreamReader that counts what arrives, and reads no faster than this machine may receive."""

    moved: Moved | None = None
    link: Moved | None = None  # the same of this peer's streams
    uncounted = 0
    transport: asyncio.Transport | None = None
    rests_until = 0.0  # by the loop's clock

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # asyncio gives bytes
        """Called by asyncio with every chunk."""
        super().feed_data(data)
        if self.moved is None:
            self.uncounted += len(data)
            return
        self.count_direct(len(data))
        seconds = self.rests_until - asyncio.get_running_loop().time()
        if seconds > 0 and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(seconds, self._go_on)

    def count_direct(self, count: int) -> None:
        """Count what was read from the socket; whoever reads it past this reader awaits `take_it_slowly` after that."""
        if self.moved is None:
            return
        self.moved.received += count
        if self.link is not None:
            self.link.received += count
        if self.moved.intake is not None and self.moved.intake.mbit:
            self.rests_until = asyncio.get_running_loop().time() + self.moved.intake.owe(count)

    def hand_over(self) -> Callable[[int], None]:
        """Let somebody else read from the socket; returns what it is to tell of each number of bytes that came."""
        self.transport = None
        return self.count_direct

    def _go_on(self) -> None:
        # one that is full has paused the transport itself, and resumes it when it was read from
        if self.transport is not None and not self.transport.is_closing() and not getattr(self, "_paused", False):
            self.transport.resume_reading()


class CountedWriter(StreamWriter):
    """A StreamWriter that counts what is written; who writes bulk awaits `pace` before."""

    moved: Moved | None = None
    link: Moved | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """As asyncio's."""
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        if self.moved is not None:
            self.moved.sent += size
        if self.link is not None:
            self.link.sent += size
        super().write(data)

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        """As asyncio's, without joining large pieces."""
        for piece in data:
            self.write(piece)


async def pace(writer: StreamWriter, count: int) -> None:
    """Wait until `count` bytes may be written, where this machine limits its upload; else return at once."""
    if isinstance(writer, CountedWriter) and writer.moved is not None and writer.moved.pacer is not None:
        await writer.moved.pacer.pay(count)


def limits_upload(writer: StreamWriter) -> bool:
    """Whether this machine sends no faster than a set rate."""
    return limit_of_upload(writer) < math.inf


def limit_of_upload(writer: StreamWriter) -> float:
    """Bytes a second that this machine sends at most, on all streams of this kind together."""
    moved = writer.moved if isinstance(writer, CountedWriter) else None
    limited = moved is not None and moved.pacer is not None and moved.pacer.mbit > 0
    return moved.pacer.mbit * 1e6 / 8 if limited and moved and moved.pacer else math.inf


def limits_intake(reader: StreamReader) -> bool:
    """Whether this machine receives no faster than a set rate."""
    moved = reader.moved if isinstance(reader, CountedReader) else None
    return moved is not None and moved.intake is not None and moved.intake.mbit > 0


async def take_it_slowly(reader: StreamReader) -> None:
    """Wait until more may be read past the reader, where this machine limits its download; else return at once."""
    if isinstance(reader, CountedReader) and reader.rests_until:
        await asyncio.sleep(max(0.0, reader.rests_until - asyncio.get_running_loop().time()))


@contextmanager
def held(writer: StreamWriter) -> Iterator[None]:
    """Take nothing from the stream's socket while the block runs: what the other side sends stays with it.

    A reader that is full has paused the transport itself, and must be the one who resumes it.
    """
    transport = writer.transport
    reads = isinstance(transport, asyncio.Transport) and not transport.is_closing() and transport.is_reading()
    if isinstance(transport, asyncio.Transport) and reads:
        transport.pause_reading()
    try:
        yield
    finally:
        if isinstance(transport, asyncio.Transport) and reads and not transport.is_closing():
            transport.resume_reading()


def count(reader: StreamReader, writer: StreamWriter, moved: Moved, handshake: int, link: Moved | None = None) -> None:
    """Start counting. handshake: bytes read so far that are not payload; payload may have come along with them.

    link: where the bytes count a second time.
    """
    if isinstance(reader, CountedReader) and isinstance(writer, CountedWriter):
        for each in (moved, link):
            if each is not None:
                each.received += reader.uncounted - handshake
        reader.moved = writer.moved = moved
        reader.link = writer.link = link


class _Protocol(StreamReaderProtocol):
    """Makes our own writer; asyncio's `client_connected_cb` could only be given asyncio's."""

    def __init__(self, accept: Callable[[CountedReader, CountedWriter], None] | None) -> None:
        self._loop_used = asyncio.get_running_loop()
        self.reader = CountedReader(limit=READ_LIMIT, loop=self._loop_used)
        super().__init__(self.reader, loop=self._loop_used)
        self._accept = accept

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.reader.transport = transport
        transport.set_write_buffer_limits(high=WRITE_LIMIT)
        if self._accept is not None:
            self._accept(self.reader, self.writer(transport))

    def writer(self, transport: Any) -> CountedWriter:
        return CountedWriter(transport, self, self.reader, self._loop_used)


Make = Callable[[], asyncio.Protocol]


async def open_with(connect: Callable[[Make], Awaitable[tuple[Any, Any]]]) -> tuple[CountedReader, CountedWriter]:
    """Connect. connect: makes a transport for a protocol, as the loop's `create_connection`. Raises OSError."""
    transport, protocol = await connect(lambda: _Protocol(None))
    return protocol.reader, protocol.writer(transport)


async def open_unix(path: Path) -> tuple[CountedReader, CountedWriter]:
    """Connect to a Unix socket. Raises OSError."""
    loop = asyncio.get_running_loop()
    return await open_with(lambda make: loop.create_unix_connection(make, str(path)))


class Listener(Protocol):
    """What a Server needs of an `asyncio.Server`."""

    @property
    def sockets(self) -> Sequence[Any]:
        """On which it listens."""
        ...

    def close(self) -> None:
        """Stop listening."""
        ...


class Server:
    """Accepts streams and runs one task for each, until it is closed."""

    def __init__(self, accept: Accept, listen: Callable[[Make], Awaitable[Listener]]) -> None:
        """listen: makes the server of a protocol, as the loop's `create_server`."""
        self._handler, self._listen = accept, listen
        self._server: Listener | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """On which it listens, if that is TCP."""
        assert self._server is not None  # noqa: S101 - it was started
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._server = await self._listen(lambda: _Protocol(self._accepted))

    def _accepted(self, reader: CountedReader, writer: CountedWriter) -> None:
        task = asyncio.create_task(self._run(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, reader: CountedReader, writer: CountedWriter) -> None:
        try:
            await self._handler(reader, writer)
        finally:
            writer.close()

    async def close(self) -> None:
        """Stop accepting, and cancel what runs."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CANCEL_S)


class UnixServer(Server):
    """On a Unix socket, which is removed when the server is closed."""

    def __init__(self, path: Path, accept: Accept) -> None:
        self._path = path
        loop = asyncio.get_running_loop()
        super().__init__(accept, lambda make: loop.create_unix_server(make, str(path), backlog=256))

    async def close(self) -> None:
        """Stop accepting, cancel what runs, remove the socket."""
        await super().close()
        self._path.unlink(missing_ok=True)
