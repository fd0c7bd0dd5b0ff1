"""A network in memory and a clock that jumps: all-reduces without p2pd and without waiting.

Streams come in two kinds: over socket pairs, which a Channel reads directly, and over plain objects, which it
reads through their StreamReader. The clock jumps to the next timer as soon as nothing else can happen.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import selectors
import socket
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from p2pllm.averaging import DenseAllReduce, ExchangeResult, Group, codec
from p2pllm.averaging.codecs import Floats
from p2pllm.errors import NetworkError
from p2pllm.network.transport import CallHandler, StreamHandler


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves to the next timer at once."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._owner = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise RuntimeError("Everything waits for something that cannot come.")
        self._owner.now += timeout
        return []


class MemoryTransport(asyncio.Transport):
    """One end of a pipe without a socket, with the flow control that StreamReader and StreamWriter expect."""

    def __init__(self, reader: StreamReader) -> None:
        super().__init__()
        self.reader = reader
        self.protocol = StreamReaderProtocol(reader)
        self.peer: MemoryTransport
        self.closing = False
        self.paused = False
        self.protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.closing and not self.peer.closing:
            self.peer.reader.feed_data(bytes(data))

    def pause_reading(self) -> None:
        if not self.paused:
            self.paused = True
            self.peer.protocol.pause_writing()

    def resume_reading(self) -> None:
        if self.paused:
            self.paused = False
            self.peer.protocol.resume_writing()

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if self.closing:
            return
        self.closing = True
        self.protocol.connection_lost(None)
        if not self.peer.closing:
            self.peer.reader.feed_eof()

    def abort(self) -> None:
        self.close()


class TappedWriter(StreamWriter):
    """A StreamWriter that tells the network how much was written."""

    on_write: Callable[[int], None]

    def write(self, data: Any) -> None:
        super().write(data)
        self.on_write(len(data))


class Peer:
    """A Transport in memory."""

    def __init__(self, network: Network, peer_id: str) -> None:
        self.network = network
        self.peer_id = peer_id
        self.written = 0
        self.on_write: Callable[[int], None] = lambda written: None
        self.writers: list[StreamWriter] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.call_handlers: dict[str, CallHandler] = {}
        self.stream_handlers: dict[str, StreamHandler] = {}

    async def call(self, peer: str, method: str, payload: bytes, timeout: float) -> bytes:
        other = self.network.find(peer)
        if method not in other.call_handlers:
            raise NetworkError(f"{peer} does not answer {method}.")
        await asyncio.sleep(0)
        return await other.call_handlers[method](self.peer_id, payload)

    async def open_stream(self, peer: str, method: str) -> tuple[StreamReader, StreamWriter]:
        other = self.network.find(peer)
        if method not in other.stream_handlers:
            raise NetworkError(f"{peer} does not answer {method}.")
        ours, theirs = await self.network.pipe(self, other)
        task = asyncio.create_task(other.handle(method, self.peer_id, *theirs))
        other.tasks.add(task)
        task.add_done_callback(other.tasks.discard)
        return ours

    async def handle(self, method: str, caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            await self.stream_handlers[method](caller, reader, writer)
        finally:
            writer.close()

    async def serve_call(self, method: str, handler: CallHandler) -> None:
        self.call_handlers[method] = handler

    async def serve_stream(self, method: str, handler: StreamHandler) -> None:
        self.stream_handlers[method] = handler

    def tapped(self, transport: asyncio.Transport, protocol: Any, reader: StreamReader) -> StreamWriter:
        writer = TappedWriter(transport, protocol, reader, asyncio.get_running_loop())
        writer.on_write = self._count
        self.writers.append(writer)
        return writer

    def _count(self, length: int) -> None:
        self.written += length
        self.on_write(self.written)

    def die(self) -> None:
        """What kill -9 does: all streams break, nothing is said."""
        self.network.dead.append(self.network.peers.pop(self.peer_id))
        for writer in self.writers:
            writer.transport.abort()
        for task in self.tasks:
            task.cancel()


class Network:
    """All peers by name, and the pipes between them."""

    def __init__(self, sockets: bool) -> None:
        self.sockets = sockets
        self.peers: dict[str, Peer] = {}
        self.dead: list[Peer] = []

    def peer(self, peer_id: str) -> Peer:
        return self.peers.setdefault(peer_id, Peer(self, peer_id))

    def find(self, peer_id: str) -> Peer:
        if peer_id not in self.peers:
            raise NetworkError(f"{peer_id} cannot be reached.")
        return self.peers[peer_id]

    async def pipe(self, *ends: Peer) -> list[tuple[StreamReader, StreamWriter]]:
        if self.sockets:
            pair = socket.socketpair()
            return [await self._socket_end(end, sock) for end, sock in zip(ends, pair, strict=True)]
        readers = [StreamReader(limit=1 << 14), StreamReader(limit=1 << 14)]
        transports = [MemoryTransport(reader) for reader in readers]
        transports[0].peer, transports[1].peer = transports[1], transports[0]
        return [
            (transport.reader, end.tapped(transport, transport.protocol, transport.reader))
            for end, transport in zip(ends, transports, strict=True)
        ]

    async def _socket_end(self, end: Peer, sock: socket.socket) -> tuple[StreamReader, StreamWriter]:
        reader = StreamReader()
        protocol = StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, sock=sock)
        return reader, end.tapped(transport, protocol, reader)


class Cluster:
    """Members a, b, c, ... with a DenseAllReduce and a vector each."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.engines: dict[str, DenseAllReduce] = {}

    async def engine(self, member: str, **options: Any) -> DenseAllReduce:
        if member not in self.engines:
            self.engines[member] = DenseAllReduce(self.network.peer(member), part_bytes=4096, **options)
            await self.engines[member].start()
        return self.engines[member]

    async def run(self, group: Group, vectors: dict[str, Floats], deadline: float = 60.0) -> dict[str, ExchangeResult]:
        """Run the members that have a vector, all at once."""
        for member in vectors:
            await self.engine(member)
        runs = [self.engines[member].run(group, vector, deadline) for member, vector in vectors.items()]
        return dict(zip(vectors, await asyncio.gather(*runs), strict=True))

    async def check_clean(self) -> None:
        """What an attempt started must have ended with it, except handlers that are about to end."""
        peers = [*self.network.peers.values(), *self.network.dead]
        handlers = {task for peer in peers for task in peer.tasks}
        left = asyncio.all_tasks() - handlers - {asyncio.current_task()}
        assert not left, left
        if handlers:
            _, stuck = await asyncio.wait(handlers, timeout=60)
            assert not stuck, stuck


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a JumpingLoop, then check that its cluster left nothing behind."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def checked() -> None:
            await test(*args, **kwargs)
            if "cluster" in kwargs:
                await kwargs["cluster"].check_clean()

        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(checked())

    return run


_ids = itertools.count()


def make_group(members: int, size: int, codec_name: str = "fp32", weights: Sequence[float] = ()) -> Group:
    """A group of members a, b, c, ...; by default they weigh 1, 2, 3, ..."""
    names = tuple("abcdefghijklmnop"[:members])
    weights = weights or range(1, members + 1)
    return Group(next(_ids).to_bytes(32, "big"), names, tuple(map(float, weights)), size, codec_name)


def make_vectors(group: Group, seed: int = 0) -> dict[str, Floats]:
    """Normal values, for each member its own."""
    rng = np.random.default_rng(seed)
    return {member: rng.standard_normal(group.size).astype(np.float32) for member in group.members}


def through(name: str, values: Floats) -> Floats:
    """What arrives of `values`."""
    out = np.empty_like(values)
    codec(name).decode(codec(name).encode(values), out)
    return out


def reference(group: Group, vectors: dict[str, Floats]) -> Floats:
    """The documented arithmetic, in the open."""
    mean = np.zeros(group.size, np.float32)
    for index, member in enumerate(group.members):
        term = through(group.codec, vectors[member]) * np.float32(group.weights[index] / math.fsum(group.weights))
        mean = term if index == 0 else mean + term
    return through(group.codec, mean)


def check(group: Group, vectors: dict[str, Floats], results: dict[str, ExchangeResult]) -> None:
    """All members hold the bits of the reference."""
    expected = reference(group, vectors).view(np.uint32)
    for result in results.values():
        assert result.reason == ""
        assert result.failed == frozenset()
        assert result.aggregate is not None
        np.testing.assert_array_equal(result.aggregate.view(np.uint32), expected)
