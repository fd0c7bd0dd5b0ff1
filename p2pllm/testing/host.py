"""MemoryHost: one host of a network in memory: a Transport and a Dialer, with counters and faults of its own.

What does not live here: what lies between hosts (`network`) and the bytes of streams (`pipe`).
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.network.transport import MAX_CALL_BYTES, CallHandler, StreamHandler
from p2pllm.testing.clock import VirtualLoop

if TYPE_CHECKING:
    from p2pllm.testing.network import MemoryNetwork

OPEN_STREAM_S = 10.0
"""Time that `open_stream` may take, as of a real node."""

OWNER: contextvars.ContextVar[MemoryHost | None] = contextvars.ContextVar("OWNER", default=None)
"""The host to which the running code belongs; all tasks that it starts inherit it."""


class Count:
    """Messages and bytes one way. A stream is one message, when it is opened."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0

    def __repr__(self) -> str:
        return f"{self.messages} messages, {self.bytes} bytes"


class Call:
    """One call or one opening of a stream, from the first byte to the answer."""

    __slots__ = ("answer", "answered", "callee", "caller", "error", "future", "is_stream", "method", "payload", "peer")

    def __init__(self, caller: MemoryHost, peer: str, method: str, payload: bytes, is_stream: bool = False) -> None:
        self.caller, self.peer, self.method, self.payload, self.is_stream = caller, peer, method, payload, is_stream
        self.callee: MemoryHost | None = None
        self.future: asyncio.Future[Any] | None = asyncio.get_running_loop().create_future()
        self.answered = False
        self.answer: Any = None
        self.error: NetworkError | None = None

    @property
    def done(self) -> bool:
        """The caller has its answer, or gave up."""
        return self.future is None or self.future.done()

    def end(self, error: NetworkError | None, answer: Any = None) -> None:
        """Give the caller its answer and forget all that was said: the network looks at it until its time-out."""
        if self.future is not None:
            if error is None:
                self.future.set_result(answer)
            else:
                self.future.set_exception(error)
        self.future = self.answer = self.callee = None
        self.payload = b""


class MemoryHost:
    """One host. Made by `MemoryNetwork.host`.

    peer_id, number, address: who it is. sent, received: a Count by method of everything so far, requests and replies
    alike. calls, streams: the handlers by method. context: code that runs in it belongs to this host and stops while
    the host is frozen; `spawn` starts a task there. on_write: called with the bytes that this host has written to
    streams so far, after every write.
    """

    __slots__ = (
        "calls", "context", "cut_off", "dead", "extra_s", "frozen", "known", "network", "number", "on_write", "peer_id",
        "pipes", "received", "sent", "side", "streams", "tasks", "written",
    )  # fmt: skip

    def __init__(self, network: MemoryNetwork, number: int, peer_id: str) -> None:
        self.network = network
        self.number = number
        self.peer_id = peer_id
        self.calls: dict[str, CallHandler] = {}
        self.streams: dict[str, StreamHandler] = {}
        self.tasks: dict[asyncio.Task[Any], None] = {}  # in the order in which they began, the same in every run
        self.pipes: dict[Any, None] = {}  # open ends of streams, in the order in which they were opened
        self.sent: dict[str, Count] = {}
        self.received: dict[str, Count] = {}
        self.written = 0
        self.on_write: Callable[[int], None] | None = None
        self.known: set[str] = set()  # whom it can dial, where addresses are needed
        self.dead = self.frozen = self.cut_off = False
        self.side = 0
        self.extra_s = 0.0
        self.context = contextvars.copy_context()
        self.context.run(OWNER.set, self)

    @property
    def address(self) -> str:
        """Where others reach it."""
        number = self.number
        return f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/1/p2p/{self.peer_id}"

    # -- Dialer and Transport ----------------------------------------------------------------------------------------

    def learn(self, peer: str, addresses: Iterable[str]) -> None:
        """See Dialer. Any address will do."""
        if self.network.needs_addresses and any(True for _ in addresses):
            self.known.add(peer)

    async def call(self, peer: str, method: str, payload: bytes, timeout: float) -> bytes:
        """See Transport. Raises UnreachableError where nobody is there, NetworkError otherwise."""
        if len(payload) > MAX_CALL_BYTES:
            raise NetworkError(f"A call of {method} has {len(payload)} bytes; {MAX_CALL_BYTES} are allowed.")
        call = Call(self, peer, method, payload)
        future: Any = call.future
        self.network.send(call, timeout)
        reply: bytes = await future
        return reply

    async def open_stream(self, peer: str, method: str, expected: int = 0) -> tuple[StreamReader, StreamWriter]:
        """See Transport. Raises UnreachableError where nobody is there, NetworkError otherwise."""
        call = Call(self, peer, method, b"", is_stream=True)
        future: Any = call.future
        self.network.send(call, OPEN_STREAM_S)
        ends: tuple[StreamReader, StreamWriter] = await future
        return ends

    async def serve_call(self, method: str, handler: CallHandler) -> None:
        """See Transport. A second handler replaces the first."""
        self.calls[method] = handler

    async def serve_stream(self, method: str, handler: StreamHandler) -> None:
        """See Transport. A second handler replaces the first."""
        self.streams[method] = handler

    # -- serving -----------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
        """Start a task that belongs to this host: it stops while the host is frozen and ends when it is killed."""
        task = asyncio.Task(work, loop=asyncio.get_running_loop(), name=name, context=self.context)
        self.tasks[task] = None
        task.add_done_callback(self._forget, context=self.network.context)
        return task

    def take(self, call: Call) -> None:
        """A call has arrived; only the network calls this."""
        if call.is_stream:
            self.spawn(self._accept(call), call.method)
            return
        self.got(call.method, len(call.payload), 1)
        # As `spawn`, but without a callback: there are many of these.
        loop = asyncio.get_running_loop()
        self.tasks[asyncio.Task(self._serve(call, call.payload), loop=loop, name=call.method, context=self.context)] = (
            None
        )

    def _forget(self, task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            self.tasks.pop(task, None)

    async def _serve(self, call: Call, payload: bytes) -> None:
        try:
            handler = self.calls.get(call.method)
            if handler is None:
                raise NetworkError(f"it does not offer {call.method}")
            call.answer = await handler(call.caller.peer_id, payload)
            if len(call.answer) > MAX_CALL_BYTES:
                raise NetworkError(f"its reply to {call.method} has {len(call.answer)} bytes")
        except asyncio.CancelledError:
            call.error = self.lost()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, its caller gets it as over a real network
            call.error = NetworkError(f"Peer {self.peer_id[-8:]}: {error}.")
        finally:
            self._forget(asyncio.current_task())
            self.network.reply(call)

    async def _accept(self, call: Call) -> None:
        handler = self.streams.get(call.method)
        if handler is None:
            call.error = NetworkError(f"Peer {self.peer_id[-8:]}: it does not offer {call.method}.")
            return self.network.reply(call)
        self.got(call.method, 0, 1)
        call.answer, (reader, writer) = await self.network.pipe(call.caller, self, call.method)
        self.network.reply(call)
        try:
            await handler(call.caller.peer_id, reader, writer)
        finally:
            writer.close()

    def lost(self) -> UnreachableError:
        """What others get who talk to this host when it is killed."""
        return UnreachableError(f"The connection to peer {self.peer_id[-8:]} was lost.")

    # -- what goes through -------------------------------------------------------------------------------------------

    def gave(self, method: str, size: int, messages: int = 0) -> None:
        """Count what this host sends."""
        count = self.sent.get(method)
        if count is None:
            count = self.sent[method] = Count()
        count.messages += messages
        count.bytes += size

    def got(self, method: str, size: int, messages: int = 0) -> None:
        """Count what this host receives."""
        count = self.received.get(method)
        if count is None:
            count = self.received[method] = Count()
        count.messages += messages
        count.bytes += size

    def wrote(self, method: str, size: int) -> None:
        """Count what this host writes to a stream."""
        self.gave(method, size)
        self.written += size
        if self.on_write is not None:
            self.on_write(self.written)

    # -- faults ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """kill -9: its tasks end, its streams break, calls to it are refused. `network.host` brings it back."""
        if self.dead:
            return
        self.dead = True
        self.thaw()  # frozen tasks could not end
        for pipe in list(self.pipes):
            pipe.abort()
        for task in list(self.tasks):
            task.cancel()
        self.network.retry()

    def freeze(self) -> None:
        """SIGSTOP: none of its code runs, it answers nothing, and its connections stand. Not from its own code."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualLoop):
            raise RuntimeError("A host can be frozen on the virtual clock only; decorate the test with `virtual`.")
        if OWNER.get() is self:
            raise RuntimeError("A host cannot freeze itself; strike from outside, as `fail_at` does.")
        if not self.dead and not self.frozen:
            self.frozen = True
            loop.freeze(self, lambda context: context.get(OWNER) is self)

    def thaw(self) -> None:
        """SIGCONT: it goes on, and finds out what time it is."""
        if self.frozen:
            self.frozen = False
            loop = asyncio.get_running_loop()
            if isinstance(loop, VirtualLoop):
                loop.thaw(self)
            self.network.retry()
