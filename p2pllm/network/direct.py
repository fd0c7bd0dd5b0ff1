"""Direct: TLS 1.3 sockets that carry bulk between peers that reach each other; p2pd is the fallback that always works.

A stream of p2pd shares one TCP connection with all others to the same peer and crosses two more processes. A socket of
its own fills a long line, keeps calls out of the queue behind bulk, and costs a third of the processor time. Each start
of a node has a certificate of its own. Peers tell each other theirs in a call, which p2pd has authenticated, and take
no other: that binds it to the peer id, and both ends check it. A stream begins with the length and the name of its
protocol, a byte and text, which is answered with one byte: TAKEN, or the caller turns to p2pd.

What does not live here: which streams are worth a dial (`node`), what certificates are (`certificates`), who is not
tried for a while (`reached`), and ways through NAT.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet, WeakValueDictionary

from p2pllm.errors import NetworkError, SettingsError
from p2pllm.network.certificates import context, name_of, name_of_other, new_certificate, restore
from p2pllm.network.door import HANDSHAKE_S, buffer_little, family_of, listen, tune
from p2pllm.network.introduction import certificate_of, introduction, port_of
from p2pllm.network.reached import Reached, bound
from p2pllm.network.streams import CountedReader, CountedWriter, Server, Traffic, count, open_with
from p2pllm.network.transport import StreamHandler
from p2pllm.network.wire import short

log = logging.getLogger(__name__)

INTRODUCE_S, DIAL_S = 1.0, 1.5
"""Time for the introduction, and for a dial. A firewall that drops what comes must not hold up a round, and who is
behind it must not seem silent in an exchange: of the least patience (`averaging.patience`) some is left for p2pd, which
is connected by then."""

MAX_HOSTS = 4
"""Hosts of one peer that are tried, all at once."""

MAX_OPEN, MAX_OPEN_PER_PEER = 2048, 48
"""Streams that others have open at a time, until their sockets are closed: several of each member of a group of 256; a
peer's lanes and its fetches. TLS takes 0.31 MB each, so all of them 0.63 GB."""

GOODBYE_S = 3.0
"""Time in which the other side of a stream that we opened, and now close, answers that with its own goodbye."""

TAKEN = b"\1"

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
        self._key = b""  # and the certificate, as in the file
        self._certificate = b""
        self._port = 0
        self._server: Server | None = None
        self._callers: dict[str, tuple[str, ssl.SSLContext]] = {}  # by the name of their certificate
        self._known: dict[str, _Known] = {}
        self._introducing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._open: Counter[str] = Counter()
        self._limited: WeakSet[asyncio.WriteTransport] = WeakSet()  # those that read no faster than a set rate
        self._reached = Reached()

    async def start(self, folder: Path, host: str, port: int) -> None:
        """Listen. folder: private, for the key. port: 0 for any. Raises SettingsError if the port is taken."""
        self._key_file = folder / _KEY_FILE
        self._certificate = new_certificate(self._key_file, self._peer_id)
        self._key = self._key_file.read_bytes()
        trusting_nobody = self._context(ssl.PROTOCOL_TLS_SERVER)
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
            self._key = b""
            self._key_file.unlink(missing_ok=True)

    def _context(self, protocol: int, trusted: bytes = b"") -> ssl.SSLContext:
        """See `certificates.context`. TLS reads our key from a file, which whoever tidies up after days may remove."""
        if not self._key:
            raise ValueError("we have stopped")
        restore(self._key_file, self._key)
        return context(protocol, self._key_file, trusted)

    # -- dialling --------------------------------------------------------------------------------------------

    async def open(self, peer: str, proto: str) -> Stream | None:
        """A stream of `proto`, or None where this peer is not reached so, or does not take it.

        Takes at most INTRODUCE_S + DIAL_S seconds.
        """
        if self._server is None or not self._reached.may_try(peer):
            return None
        try:
            async with asyncio.timeout(INTRODUCE_S + DIAL_S):
                stream = await self._dial(peer)
                is_taken = await self._is_taken(stream, peer, proto)
                self._reached.worked(peer)
                return stream if is_taken else None
        except (OSError, NetworkError, ValueError) as error:  # TimeoutError is an OSError
            self._reached.failed(peer)
            self._known.pop(peer, None)  # it may be somewhere else by then
            log.info("peer %s is not reached directly (%s); p2pd carries its bulk", short(peer), error or "no answer")
            return None

    async def _is_taken(self, stream: Stream, peer: str, proto: str) -> bool:
        """Say what the stream is for. False, and it is closed, where the peer has no room for it or serves no such."""
        reader, writer = stream
        word, answer = proto.encode(), b""
        try:
            writer.write(bytes([len(word)]) + word)
            with contextlib.suppress(OSError):
                answer = await reader.read(1)
        finally:
            if answer == TAKEN:
                self._count(stream, peer, proto, handshake=1)
            else:
                writer.transport.abort()
        return answer == TAKEN

    async def _dial(self, peer: str) -> Stream:
        """Raises OSError, NetworkError, ValueError."""
        known = self._known.get(peer)
        if known is not None:
            with contextlib.suppress(OSError):  # the peer may have been started anew
                return await self._connect(known)
        async with asyncio.timeout(INTRODUCE_S), self._introducing.setdefault(peer, asyncio.Lock()):
            now_known = self._known.get(peer)
            if now_known is None or now_known is known:
                now_known = self._known[peer] = await self._introduced(peer)
                bound(self._known)
        return await self._connect(now_known)

    async def _introduced(self, peer: str) -> _Known:
        answer = await self._call(peer, introduction(self._certificate))
        port, certificate = port_of(answer), certificate_of(answer, peer)
        trusting = self._context(ssl.PROTOCOL_TLS_CLIENT, certificate)
        hosts = tuple(dict.fromkeys(await self._hosts(peer)))[:MAX_HOSTS]
        return _Known(trusting, name_of(certificate), port, hosts)

    async def _connect(self, known: _Known) -> Stream:
        """To the first of its hosts that answers, which is the only one from then on. Raises OSError, ValueError."""
        tasks = {asyncio.create_task(self._connect_to(host, known)): host for host in known.hosts}
        error: BaseException = OSError("no host of it is known")
        try:
            async with asyncio.timeout(DIAL_S):
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
        except BaseException:
            sock.close()
            raise
        # From here on the socket is asyncio's, which may go on with a handshake that was cancelled as it began: closed
        # by us, its number would be another socket's while asyncio still listens to it.
        stream = await open_with(
            lambda make: loop.create_connection(
                make,
                sock=sock,
                ssl=known.context,
                server_hostname=name_of(self._certificate),
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=GOODBYE_S,
            )
        )
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
        certificate = certificate_of(payload, peer)
        name = name_of(certificate)
        if name not in self._callers:
            for old in [old for old, (other, _) in self._callers.items() if other == peer]:
                del self._callers[old]
            self._callers[name] = (peer, self._context(ssl.PROTOCOL_TLS_SERVER, certificate))
            bound(self._callers)
            self._reached.started_anew(peer)
            self._known.pop(peer, None)
        return introduction(self._certificate, self._port)

    def _choose(self, tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        """The context that takes the certificate of this caller and no other."""
        if name not in self._callers:
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        tls.context = self._callers[name][1]
        return None

    async def _accepted(self, reader: CountedReader, writer: CountedWriter) -> None:
        """A stream counts as open until its socket is closed: the other side may take its time to say goodbye."""
        try:
            peer, _ = self._callers[name_of_other(writer)]
            if self._open.total() >= MAX_OPEN or self._open[peer] >= MAX_OPEN_PER_PEER:
                raise OSError("it has too many streams open, or all have")
            self._open[peer] += 1
            try:
                await self._serve(peer, reader, writer)
                writer.close()
                await writer.wait_closed()
            finally:
                self._open[peer] -= 1
                if not self._open[peer]:
                    del self._open[peer]
        except (OSError, EOFError, ValueError, KeyError) as error:
            writer.transport.abort()
            log.debug("a direct stream ended: %r", error)
        except Exception:
            writer.transport.abort()
            log.exception("a stream handler failed")

    async def _serve(self, peer: str, reader: CountedReader, writer: CountedWriter) -> None:
        """Raises OSError where nobody serves what it is for."""
        async with asyncio.timeout(HANDSHAKE_S):
            length = (await reader.readexactly(1))[0]
            proto = (await reader.readexactly(length)).decode()
        handler = self._served(proto)
        if handler is None:
            raise OSError("nobody serves that")
        writer.write(TAKEN)
        self._count((reader, writer), peer, proto, handshake=1 + length)
        await handler(peer, reader, writer)


async def _drop(tasks: Iterable[asyncio.Task[Stream]]) -> None:
    """End dials that are not needed any more, and close what they have opened."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(result, BaseException):
            result[1].transport.abort()
