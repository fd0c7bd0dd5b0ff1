"""Groups of all-reduces on the kit's network, and what their results must be.

`SocketNetwork` differs in its streams alone: they are socket pairs, from which a Channel reads directly.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import socket
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from p2pllm import testing
from p2pllm.averaging import DenseAllReduce, ExchangeResult, Group, codec
from p2pllm.averaging.codecs import Floats
from p2pllm.testing import MemoryHost, MemoryNetwork


class TappedWriter(StreamWriter):
    """A StreamWriter that tells the host how much was written."""

    on_write: Callable[[int], None]

    def write(self, data: Any) -> None:
        super().write(data)
        self.on_write(len(data))


class SocketNetwork(MemoryNetwork):
    """Streams are socket pairs."""

    async def pipe(self, caller: MemoryHost, callee: MemoryHost, method: str) -> Any:
        pair = socket.socketpair()
        return [await self._end(end, sock, method) for end, sock in zip((caller, callee), pair, strict=True)]

    async def _end(self, end: MemoryHost, sock: socket.socket, method: str) -> tuple[StreamReader, StreamWriter]:
        loop, reader = asyncio.get_running_loop(), StreamReader()
        protocol = StreamReaderProtocol(reader)
        transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
        writer = TappedWriter(transport, protocol, reader, loop)
        writer.on_write = functools.partial(end.wrote, method)
        end.pipes[transport] = None
        return reader, writer


class Cluster:
    """Members a, b, c, ... with a DenseAllReduce and a vector each."""

    def __init__(self, network: MemoryNetwork, lanes: int = 1) -> None:
        self.network, self.lanes = network, lanes
        self.engines: dict[str, DenseAllReduce] = {}

    def host(self, member: str) -> MemoryHost:
        """The host of this member, or of a stranger."""
        return self.network.hosts.get(member) or self.network.host(member)

    async def engine(self, member: str, **options: Any) -> DenseAllReduce:
        if member not in self.engines:
            self.engines[member] = DenseAllReduce(self.host(member), part_bytes=4096, lanes=self.lanes, **options)
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
        handlers = {task for host in self.network.hosts.values() for task in host.tasks}
        left = asyncio.all_tasks() - handlers - {asyncio.current_task()}
        assert not left, left
        if handlers:
            _, stuck = await asyncio.wait(handlers, timeout=60)
            assert not stuck, stuck


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in virtual time, then check that its cluster left nothing behind."""

    @functools.wraps(test)
    async def checked(*args: Any, **kwargs: Any) -> None:
        await test(*args, **kwargs)
        if "cluster" in kwargs:
            await kwargs["cluster"].check_clean()

    return testing.virtual(checked)


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
