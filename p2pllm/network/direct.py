"""Direct: TLS 1.3 sockets that carry bulk between peers that reach each other; p2pd is the fallback that always works.

A stream of p2pd shares one TCP connection with all others to the same peer and crosses two more processes. A socket of
its own fills a long line, keeps calls out of the queue behind bulk, and costs a third of the processor time. Each start
of a node has a certificate of its own. Peers tell each other theirs in a call, which p2pd has authenticated, and take
no other: that binds it to the peer id, and both ends check it.

What does not live here: which streams are worth a dial (`node`), what certificates are (`certificates`), and ways
through NAT: whoever is not reached within DIAL_S is not tried again for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from p2pllm.errors import NetworkError, SettingsError
from p2pllm.network.certificates import context, name_of, name_of_other, new_certificate, owner_of
from p2pllm.network.door import HANDSHAKE_S, buffer_little, family_of, listen, tune
from p2pllm.network.messages import pack, unpack
from p2pllm.network.streams import CountedReader, CountedWriter, Server, Traffic, count, open_with
from p2pllm.network.transport import StreamHandler
from p2pllm.network.wire import short

log = logging.getLogger(__name__)

METHOD = "direct/1"
"""The call in which peers introduce themselves: {certificate} -> {certificate, port}."""

DIAL_S = 1.5
"""Time for the introduction and the dial, both; a firewall that drops what comes must not hold up a round, and who is
behind it must not seem silent in an exchange (`averaging.patience`)."""

RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
"""A peer that was not reached is tried again after so long, and twice as long after every further failure."""

MAX_PEERS = 256
"""Peers that may dial us, and whom we know how to dial; the oldest are forgotten."""

MAX_HOSTS = 4
"""Hosts of one peer that are tried, all at once."""

MAX_OPEN, MAX_OPEN_PER_PEER = 4096, 48
"""Streams that others have open at a time: a group of 256 in 4 lanes, several times; a peer's lanes and its fetches."""

_MAX_CERTIFICATE_BYTES = 1024
_MAX_INTRODUCTION_BYTES = 2048
_KEY_FILE = "direct.pem"

Stream = tuple[CountedReader, CountedWriter]


@dataclass
class _Known:
    """How a peer is dialled."""

    context: ssl.SSLContext
    name: str
    port: int
    hosts: tuple[str, ...]


class Direct:
    """Opens and accepts direct streams. Made once a node, started and stopped with it."""

    def __init__(
        self,
        peer_id: str,
        traffic: Traffic,
        call: Callable[[str, bytes], Awaitable[bytes]],
        hosts: Callable[[str], Awaitable[Iterable[str]]],
        served: Callable[[str], StreamHandler | None],
    ) -> None:
        """peer_id: ours. call: introduces us to a peer, and returns its answer. hosts: IP addresses where a peer may
        be, likely ones first. served: who takes streams of a protocol.
        """
        self._peer_id, self._traffic, self._call, self._hosts, self._served = peer_id, traffic, call, hosts, served
        self._key_file = Path(os.devnull)
        self._certificate = b""
        self._port = 0
        self._server: Server | None = None
        self._callers: dict[str, tuple[str, ssl.SSLContext]] = {}  # by the name of their certificate
        self._known: dict[str, _Known] = {}
        self._introducing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._open: Counter[str] = Counter()
        self._limited: WeakSet[asyncio.WriteTransport] = WeakSet()  # those that read no faster than a set rate
        self._failed: dict[str, tuple[float, float]] = {}  # until when, and for how long, a peer is not tried

    async def start(self, folder: Path, host: str, port: int) -> None:
        """Listen. folder: private, for the key. port: 0 for any. Raises SettingsError if the port is taken."""
        self._key_file = folder / _KEY_FILE
        self._certificate = new_certificate(self._key_file, self._peer_id)
        trusting_nobody = context(ssl.PROTOCOL_TLS_SERVER, self._key_file)
        trusting_nobody.sni_callback = self._choose
        server = Server(self._accepted, lambda make: listen(make, host, port, trusting_nobody))
        try:
            await server.start()
        except OSError as error:
            self._key_file.unlink(missing_ok=True)
            raise SettingsError(
                f"This machine cannot listen on {host} port {port} for bulk: {error.strerror or error}; "
                "choose another with direct_port, or 0 for any free one."
            ) from None
        self._port = server.port
        self._server = server

    async def stop(self) -> None:
        """Close all that others opened, and forget our key."""
        if self._server is not None:
            await self._server.close()
            self._server = None
            self._callers.clear()  # with the certificate that goes
            self._known.clear()
            self._key_file.unlink(missing_ok=True)

    # -- dialling --------------------------------------------------------------------------------------------

    async def open(self, peer: str, proto: str) -> Stream | None:
        """A stream of `proto`, or None where this peer is not reached so. Takes at most DIAL_S seconds."""
        clock = asyncio.get_running_loop().time
        if self._server is None or self._failed.get(peer, (0.0, 0.0))[0] > clock():
            return None
        try:
            async with asyncio.timeout(DIAL_S):
                stream = await self._dial(peer)
        except (OSError, NetworkError, ValueError) as error:  # TimeoutError is an OSError
            self._fail(peer, clock())
            self._known.pop(peer, None)  # it may be somewhere else by then
            log.info("peer %s is not reached directly (%s); p2pd carries its bulk", short(peer), error or "no answer")
            return None
        self._failed.pop(peer, None)
        word = proto.encode()
        stream[1].write(bytes([len(word)]) + word)
        self._count(stream, peer, proto, 0)
        return stream

    def _fail(self, peer: str, now: float) -> None:
        until, pause = self._failed.get(peer, (0.0, RETRY_S / 2))
        if until > now:
            return  # several streams failed at once
        pause = min(2 * pause, LONGEST_RETRY_S)
        self._failed[peer] = (now + pause, pause)
        _bound(self._failed)

    async def _dial(self, peer: str) -> Stream:
        """Raises OSError, NetworkError, ValueError."""
        known = self._known.get(peer)
        if known is not None:
            with contextlib.suppress(OSError):  # the peer may have been started anew
                return await self._connect(known)
        async with self._introducing.setdefault(peer, asyncio.Lock()):
            now_known = self._known.get(peer)
            if now_known is None or now_known is known:
                now_known = self._known[peer] = await self._introduced(peer)
                _bound(self._known)
        return await self._connect(now_known)

    async def _introduced(self, peer: str) -> _Known:
        answer = _unpack(await self._call(peer, pack({"certificate": self._certificate})))
        port, certificate = answer.get("port"), _certificate_in(answer, peer)
        if type(port) is not int or not 0 < port < 1 << 16:
            raise ValueError("it listens on no port for that")
        trusting = context(ssl.PROTOCOL_TLS_CLIENT, self._key_file, certificate)
        hosts = tuple(dict.fromkeys(await self._hosts(peer)))[:MAX_HOSTS]
        return _Known(trusting, name_of(certificate), port, hosts)

    async def _connect(self, known: _Known) -> Stream:
        """To the first of its hosts that answers, which is the only one from then on. Raises OSError, ValueError."""
        tasks = {asyncio.create_task(self._connect_to(host, known)): host for host in known.hosts}
        error: BaseException = OSError("no host of it is known")
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (failure := task.exception()) is None:
                        known.hosts = (tasks.pop(task),)
                        return task.result()
                    error = failure
        finally:
            await _drop(tasks)
        raise error

    async def _connect_to(self, host: str, known: _Known) -> Stream:
        loop = asyncio.get_running_loop()
        sock = socket.socket(family_of(host), socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            sock.setblocking(False)
            tune(sock)
            await loop.sock_connect(sock, (host, known.port))
            stream = await open_with(
                lambda make: loop.create_connection(
                    make, sock=sock, ssl=known.context, server_hostname=name_of(self._certificate)
                )
            )
        except BaseException:
            sock.close()
            raise
        if name_of_other(stream[1]) != known.name:
            stream[1].transport.abort()
            raise OSError("it has another certificate than it said")
        return stream

    def _count(self, stream: Stream, peer: str, proto: str, handshake: int) -> None:
        if self._traffic.intake.mbit:
            self._limited.add(stream[1].transport)
            buffer_little([each for each in self._limited if not each.is_closing()], self._traffic.intake.mbit)
        count(*stream, self._traffic.of(proto), handshake, self._traffic.with_(peer))

    # -- answering -------------------------------------------------------------------------------------------

    async def introduce(self, peer: str, payload: bytes) -> bytes:
        """Answer a peer's introduction: from now on it may dial us. Raises ValueError for what is no certificate."""
        certificate = _certificate_in(_unpack(payload), peer)
        name = name_of(certificate)
        if name not in self._callers:
            for old in [old for old, (other, _) in self._callers.items() if other == peer]:
                del self._callers[old]
            self._callers[name] = (peer, context(ssl.PROTOCOL_TLS_SERVER, self._key_file, certificate))
            _bound(self._callers)
            self._failed.pop(peer, None)  # it was started anew
            self._known.pop(peer, None)
        return pack({"certificate": self._certificate, "port": self._port})

    def _choose(self, tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        """The context that takes the certificate of this caller and no other."""
        if name not in self._callers:
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        tls.context = self._callers[name][1]
        return None

    async def _accepted(self, reader: CountedReader, writer: CountedWriter) -> None:
        try:
            peer, _ = self._callers[name_of_other(writer)]
            with self._place(peer):
                async with asyncio.timeout(HANDSHAKE_S):
                    length = (await reader.readexactly(1))[0]
                    proto = (await reader.readexactly(length)).decode()
                if handler := self._served(proto):
                    self._count((reader, writer), peer, proto, handshake=1 + length)
                    await handler(peer, reader, writer)
        except (OSError, EOFError, ValueError, KeyError) as error:
            log.debug("a direct stream ended: %r", error)
        except Exception:
            log.exception("a stream handler failed")

    @contextlib.contextmanager
    def _place(self, peer: str) -> Iterator[None]:
        """One of the streams that a peer may have open. Raises OSError."""
        if self._open.total() >= MAX_OPEN or self._open[peer] >= MAX_OPEN_PER_PEER:
            raise OSError("it has too many streams open, or all have")
        self._open[peer] += 1
        try:
            yield
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


async def _drop(tasks: Iterable[asyncio.Task[Stream]]) -> None:
    """End dials that are not needed any more, and close what they have opened."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(result, BaseException):
            result[1].transport.abort()


def _unpack(payload: bytes) -> dict[str, object]:
    value = unpack(payload, _MAX_INTRODUCTION_BYTES)
    if not isinstance(value, dict):
        raise ValueError("an introduction is not a map")
    return value


def _certificate_in(value: dict[str, object], peer: str) -> bytes:
    """Made out to the peer, which p2pd has authenticated: nobody takes another one's."""
    found = value.get("certificate")
    if not isinstance(found, bytes) or not 0 < len(found) <= _MAX_CERTIFICATE_BYTES:
        raise ValueError("there is no certificate in an introduction")
    if owner_of(found) != peer:
        raise ValueError("this is the certificate of somebody else")
    return found


def _bound(what: dict[str, Any]) -> None:
    while len(what) > MAX_PEERS:
        del what[next(iter(what))]
