"""Our side of p2pd's control protocol: calls and streams, over Unix sockets.

It has the methods that hivemind's own client has, so hivemind's P2P can be put on top of it (`dht` does), but
not its faults: there a reply to a call that was just cancelled ends the reading task and hangs every later
call, calls in flight hang when p2pd dies, and cancelled handlers are kept for good. What does not live here:
starting p2pd (`p2pd`), restarting it and knowing addresses (`node`).
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from google.protobuf.message import DecodeError, Message
from hivemind.p2p import PeerID
from hivemind.proto import p2pd_pb2 as pb

from p2pllm.errors import NetworkError
from p2pllm.network.streams import Traffic, UnixServer, count, open_unix
from p2pllm.network.wire import (
    MAX_MESSAGE_BYTES,
    failure,
    framed,
    one_line,
    read_message,
    short,
    unix_address,
    write_message,
)

log = logging.getLogger(__name__)

UnaryHandler = Callable[[bytes, PeerID], Awaitable[bytes]]
PeerStreamHandler = Callable[[PeerID, StreamReader, StreamWriter], Awaitable[None]]

P2PD_STOPPED = "p2pd has stopped on this machine and is being restarted."

_MAX_HANDLERS = 1024
"""Calls answered at the same time; further ones are refused."""

_CANCEL_S = 0.5
"""A handler that does not end when it is cancelled is left behind."""

_HANDSHAKE_S = 10.0
"""p2pd's first message on an incoming stream is there at once, or p2pd is broken."""


class Control:
    """One connection to a running p2pd. Made by `open`."""

    def __init__(self, control_socket: Path, stream_socket: Path, traffic: Traffic) -> None:
        self._socket = control_socket
        self._stream_socket = stream_socket
        self._traffic = traffic
        self._server = UnixServer(stream_socket, self._incoming)
        self._unary: dict[str, UnaryHandler] = {}
        self._streams: dict[str, PeerStreamHandler] = {}
        self._pending: dict[bytes, asyncio.Future[Any]] = {}
        self._answering: dict[bytes, asyncio.Task[None]] = {}
        self._writer: StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.lost = asyncio.Event()

    @classmethod
    async def open(cls, control_socket: Path, stream_socket: Path, traffic: Traffic) -> Control:
        """Connect. Raises NetworkError."""
        self = cls(control_socket, stream_socket, traffic)
        try:
            await self._server.start()
            reader, self._writer = await open_unix(control_socket)
            await write_message(self._writer, pb.Request(type=pb.Request.PERSISTENT_CONN_UPGRADE))
            await read_message(reader, pb.Response())
        except (OSError, IncompleteReadError, DecodeError) as error:
            await self.close()
            raise NetworkError(f"p2pd does not answer on {control_socket}: {error}.") from None
        self._reading = asyncio.create_task(self._read_loop(reader))
        return self

    async def close(self) -> None:
        """Fail the calls in flight, end the handlers, remove our socket. p2pd exits when it sees this."""
        tasks = list(self._answering.values())
        if self._reading is not None:
            tasks.append(self._reading)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)
        self._fail_pending()
        if self._writer is not None:
            self._writer.transport.abort()
        await self._server.close()

    # -- calls ---------------------------------------------------------------------------------------------

    async def call_unary_handler(self, peer_id: PeerID, proto: str, data: bytes) -> bytes:
        """Call another peer. Raises NetworkError; without a time-out of its own."""
        request = pb.CallUnaryRequest(peer=peer_id.to_bytes(), proto=proto, data=data)
        self._traffic.calls.sent += len(data)
        reply = await self._ask_daemon(f"calling {proto}", peer_id, callUnary=request)
        if reply.HasField("error"):
            text = one_line(reply.error.decode(errors="replace"))
            raise NetworkError(f"Peer {short(peer_id.to_base58())} failed to answer: {text}.")
        self._traffic.calls.received += len(reply.response)
        return bytes(reply.response)

    async def add_unary_handler(self, proto: str, handler: UnaryHandler, balanced: bool = False) -> None:
        """Answer calls of `proto`. Raises NetworkError."""
        self._unary[proto] = handler
        request = pb.AddUnaryHandlerRequest(proto=proto, balanced=balanced)
        await self._ask_daemon(f"serving {proto}", None, addUnaryHandler=request)

    async def remove_unary_handler(self, proto: str) -> None:
        """No longer answer calls of `proto`. Raises NetworkError."""
        self._unary.pop(proto, None)
        await self._ask_daemon(f"ending {proto}", None, removeUnaryHandler=pb.RemoveUnaryHandlerRequest(proto=proto))

    async def _ask_daemon(self, what: str, peer: PeerID | None, **field: Message) -> Any:
        call_id = uuid4().bytes
        message = pb.PersistentConnectionRequest(callId=call_id, **field)
        if message.ByteSize() > MAX_MESSAGE_BYTES:
            raise NetworkError(f"A message of {message.ByteSize()} bytes is too long for {what}.")
        future = self._pending[call_id] = asyncio.get_running_loop().create_future()
        try:
            await self._send(message)
            response = await future
        except asyncio.CancelledError:
            if self._writer is not None and not self.lost.is_set():
                self._writer.write(framed(pb.PersistentConnectionRequest(callId=call_id, cancel=pb.Cancel())))
            raise
        finally:
            del self._pending[call_id]
            if future.done() and not future.cancelled():
                future.exception()  # marks it as seen where we were cancelled at the same moment
        if response.HasField("daemonError"):
            message_text = str(response.daemonError.message)
            raise (failure(peer, message_text) if peer else NetworkError(f"p2pd failed {what}: {message_text}."))
        return response.callUnaryResponse if peer is not None else None

    async def _send(self, message: Message) -> None:
        if self.lost.is_set() or self._writer is None:
            raise _lost_error()
        try:
            self._writer.write(framed(message))
            await self._writer.drain()
        except OSError:
            raise _lost_error() from None

    async def _read_loop(self, reader: StreamReader) -> None:
        try:
            while True:
                self._dispatch(await read_message(reader, pb.PersistentConnectionResponse()))
        except (OSError, IncompleteReadError, DecodeError) as error:
            log.debug("the connection to p2pd ended: %r", error)
        finally:
            self._fail_pending()

    def _fail_pending(self) -> None:
        self.lost.set()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(_lost_error())

    def _dispatch(self, response: Any) -> None:
        call_id = bytes(response.callId)
        if response.HasField("requestHandling"):
            task = asyncio.create_task(self._answer(call_id, response.requestHandling))
            self._answering[call_id] = task
            task.add_done_callback(lambda _: self._answering.pop(call_id, None))
        elif response.HasField("cancel"):
            if call_id in self._answering:
                self._answering[call_id].cancel()
        else:
            future = self._pending.get(call_id)
            if future is not None and not future.done():  # it may have been cancelled in this turn of the loop
                future.set_result(response)

    async def _answer(self, call_id: bytes, request: Any) -> None:
        self._traffic.calls.received += len(request.data)
        handler = self._unary.get(request.proto)
        try:
            if handler is None:
                raise NetworkError("not offered here")
            if len(self._answering) > _MAX_HANDLERS:
                raise NetworkError("too many calls at once")
            data = await handler(request.data, PeerID(request.peer))
            reply = pb.CallUnaryResponse(response=data)
            self._traffic.calls.sent += len(data)
        except Exception as error:
            log.debug("a call of %s failed", request.proto, exc_info=True)
            reply = pb.CallUnaryResponse(error=f"{type(error).__name__}: {error}"[:200].encode())
        await self._reply(call_id, reply)

    async def _reply(self, call_id: bytes, reply: Message) -> None:
        try:
            await self._send(pb.PersistentConnectionRequest(callId=call_id, unaryResponse=reply))
        except NetworkError:
            log.debug("p2pd went away before a reply")

    # -- streams -------------------------------------------------------------------------------------------

    async def open_stream(self, peer_id: PeerID, proto: str) -> tuple[StreamReader, StreamWriter]:
        """Open a stream to another peer. Raises NetworkError; without a time-out of its own."""
        request = pb.StreamOpenRequest(peer=peer_id.to_bytes(), proto=[proto])
        reader, writer, response = await self._ask(pb.Request(type=pb.Request.STREAM_OPEN, streamOpen=request), peer_id)
        link = self._traffic.with_(peer_id.to_base58())
        count(reader, writer, self._traffic.of(proto), len(framed(response)), link)
        return reader, writer

    async def serve_stream(self, proto: str, handler: PeerStreamHandler) -> None:
        """Hand incoming streams of `proto` to `handler`. Raises NetworkError."""
        self._streams[proto] = handler
        address = unix_address(self._stream_socket)
        request = pb.StreamHandlerRequest(addr=address, proto=[proto], balanced=False)
        await self._ask_once(pb.Request(type=pb.Request.STREAM_HANDLER, streamHandler=request))

    async def _incoming(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                info: Any = await read_message(reader, pb.StreamInfo())
            handler = self._streams[info.proto]
            peer = PeerID(info.peer)
            link = self._traffic.with_(peer.to_base58())
            count(reader, writer, self._traffic.of(info.proto), len(framed(info)), link)
            await handler(peer, reader, writer)
        except (OSError, IncompleteReadError, DecodeError, TimeoutError, NetworkError, KeyError) as error:
            log.debug("an incoming stream ended: %r", error)
        except Exception:
            log.exception("a stream handler failed")

    # -- other requests ------------------------------------------------------------------------------------

    async def identify(self) -> tuple[PeerID, tuple[bytes, ...]]:
        """Our peer id and the binary multiaddresses at which p2pd thinks that it can be reached."""
        response = await self._ask_once(pb.Request(type=pb.Request.IDENTIFY))
        return PeerID(response.identify.id), tuple(response.identify.addrs)

    async def connect(self, peer_id: PeerID, addresses: Iterable[bytes]) -> None:
        """Connect to a peer at binary multiaddresses, which p2pd then remembers. Raises NetworkError."""
        request = pb.ConnectRequest(peer=peer_id.to_bytes(), addrs=list(addresses))
        await self._ask_once(pb.Request(type=pb.Request.CONNECT, connect=request), peer_id)

    async def remote_addresses(self, peer_id: PeerID) -> list[bytes]:
        """Binary multiaddresses of the other ends of our connections with a peer. Raises NetworkError."""
        response = await self._ask_once(pb.Request(type=pb.Request.LIST_PEERS))
        wanted = peer_id.to_bytes()
        return [bytes(address) for info in response.peers if info.id == wanted for address in info.addrs]

    async def _ask_once(self, request: Message, peer: PeerID | None = None) -> Any:
        _, writer, response = await self._ask(request, peer)
        writer.close()
        return response

    async def _ask(self, request: Message, peer: PeerID | None) -> tuple[StreamReader, StreamWriter, Any]:
        """Send a request on a connection of its own. The connection is closed unless this returns."""
        if self.lost.is_set():
            raise _lost_error()
        writer = None
        try:
            reader, writer = await open_unix(self._socket)
            await write_message(writer, request)
            response: Any = await read_message(reader, pb.Response())
            if response.type == pb.Response.ERROR:
                text = str(response.error.msg)
                raise failure(peer, text) if peer else NetworkError(f"p2pd refused a request: {text[:200]}.")
        except BaseException as error:
            if writer is not None:
                writer.transport.abort()
            if isinstance(error, (OSError, IncompleteReadError, DecodeError)):
                raise _lost_error() from None
            raise
        return reader, writer, response


def _lost_error() -> NetworkError:
    return NetworkError(P2PD_STOPPED)
