"""A network in memory that can kill, freeze and cut off peers, and an event loop whose clock jumps.

Nothing sleeps: the clock moves to the next timer as soon as nothing else can happen, and work for threads is done
at once.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.identity import peer_id_of
from p2pllm.network.transport import CallHandler, StreamHandler

LATENCY_S = 0.001


def peer_number(number: int) -> str:
    """The id of peer 0, 1, 2, ..."""
    return peer_id_of((number + 1).to_bytes(32, "big"))


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves to the next timer at once, and whose threads are no threads."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever awaits it gets it, as from a thread
            future.set_exception(error)
        return future


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
        self._owner.now += max(timeout, 1e-6)
        return []


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a JumpingLoop."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


# -- the network -----------------------------------------------------------------------------------------------


class Network:
    """All hosts, which of them are dead or hang, and which links are cut."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.dead: set[str] = set()
        self.hung: set[str] = set()
        self.cut: set[frozenset[str]] = set()
        self.calls: list[tuple[str, str, str]] = []
        self.pipes: list[Pipe] = []

    def host(self, number: int) -> Host:
        host = Host(self, peer_number(number))
        self.hosts[host.peer_id] = host
        return host

    def hangs(self, *ends: str) -> bool:
        return bool(self.hung & set(ends)) or frozenset(ends) in self.cut

    def kill(self, peer: str) -> None:
        """What kill -9 does: streams break, calls are refused."""
        self.dead.add(peer)
        for pipe in self.pipes:
            if peer in (pipe.own, pipe.other):
                pipe.abort()

    def heal(self) -> None:
        """Nothing hangs any more; what was on its way arrives."""
        self.hung.clear()
        self.cut.clear()
        for pipe in self.pipes:
            pipe.flush()


class Pipe(asyncio.Transport):
    """One end of a stream."""

    def __init__(self, network: Network, own: str, other: str) -> None:
        super().__init__()
        self.network, self.own, self.other = network, own, other
        self.reader = StreamReader(limit=1 << 22)
        self.protocol = StreamReaderProtocol(self.reader)
        self.peer: Pipe
        self.closing = False
        self.held: list[bytes | None] = []
        self.under_way: deque[bytes | None] = deque()
        self.protocol.connection_made(self)
        network.pipes.append(self)

    def write(self, data: Any) -> None:
        if not self.closing:
            self._deliver(bytes(data))

    def _deliver(self, data: bytes | None) -> None:
        if self.network.hangs(self.own, self.other) or self.held:
            self.held.append(data)
        else:
            # Timers of the same time come in any order; what was written first must arrive first.
            self.under_way.append(data)
            asyncio.get_running_loop().call_later(LATENCY_S, self._arrive)

    def flush(self) -> None:
        held, self.held = self.held, []
        for data in held:
            self._deliver(data)

    def _arrive(self) -> None:
        data, other = self.under_way.popleft(), self.peer
        if not other.closing:
            other.reader.feed_eof() if data is None else other.reader.feed_data(data)

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.protocol.connection_lost(None)
            self._deliver(None)

    def abort(self) -> None:
        self.close()


class Host:
    """A Transport in memory."""

    def __init__(self, network: Network, peer_id: str) -> None:
        self.network = network
        self.peer_id = peer_id
        self.calls: dict[str, CallHandler] = {}
        self.streams: dict[str, StreamHandler] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"/ip4/10.0.0.1/tcp/1/p2p/{self.peer_id}"

    def learn(self, peer: str, addresses: Iterable[str]) -> None: ...

    async def serve_call(self, method: str, handler: CallHandler) -> None:
        self.calls[method] = handler

    async def serve_stream(self, method: str, handler: StreamHandler) -> None:
        self.streams[method] = handler

    async def call(self, peer: str, method: str, payload: bytes, timeout: float) -> bytes:
        self.network.calls.append((self.peer_id, peer, method))
        try:
            async with asyncio.timeout(timeout):
                await self._travel(peer)
                host = self.network.hosts[peer]
                if method not in host.calls:
                    raise NetworkError("protocols not supported")
                reply = await host.calls[method](self.peer_id, payload)
                if peer not in self.network.dead:
                    await host._travel(self.peer_id)
                if peer in self.network.dead:
                    raise UnreachableError("stream reset")
                return reply
        except TimeoutError:
            raise NetworkError("no answer") from None
        except NetworkError:
            raise
        except Exception as error:  # noqa: BLE001 - as over a real network, whatever it was
            raise NetworkError(str(error)) from None

    async def open_stream(self, peer: str, method: str) -> tuple[StreamReader, StreamWriter]:
        try:
            async with asyncio.timeout(10.0):
                await self._travel(peer)
        except TimeoutError:
            raise NetworkError("no stream") from None
        host = self.network.hosts[peer]
        if method not in host.streams:
            raise NetworkError("protocols not supported")
        ours, theirs = Pipe(self.network, self.peer_id, peer), Pipe(self.network, peer, self.peer_id)
        ours.peer, theirs.peer = theirs, ours
        task = asyncio.create_task(host._handle(method, self.peer_id, theirs))
        host.tasks.add(task)
        task.add_done_callback(host.tasks.discard)
        return ours.reader, _writer(ours)

    async def _travel(self, peer: str) -> None:
        await asyncio.sleep(LATENCY_S)
        network = self.network
        while network.hangs(self.peer_id, peer):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.05)
        if self.peer_id in network.dead:
            raise UnreachableError("stream reset")
        if peer in network.dead or peer not in network.hosts:
            raise UnreachableError("refused")

    async def _handle(self, method: str, caller: str, pipe: Pipe) -> None:
        try:
            await self.streams[method](caller, pipe.reader, _writer(pipe))
        finally:
            pipe.close()


def _writer(pipe: Pipe) -> StreamWriter:
    return StreamWriter(pipe, pipe.protocol, pipe.reader, asyncio.get_running_loop())
