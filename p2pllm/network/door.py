"""Door: listens for TLS connections, and lets in a few at a time.

asyncio's own server starts a handshake, with a buffer of 256 KiB, for everybody who connects; here further ones wait in
the kernel's queue, but not for long behind who says nothing. Also what sockets that carry bulk are set to. What does
not live here: whose certificate is taken, and what is said on a connection (`direct`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Collection

from p2pllm.network.streams import Make

log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
"""Time in which a caller shows its certificate, and again in which it says what it wants."""

MAX_HANDSHAKES = 128
"""At a time."""

PRESSED_S = 0.5
"""While others wait, the oldest handshake of the host that has most of them is given up after so long."""

_BACKLOG = 256
_REST_S = 1.0

_BUFFER_S = 0.1
"""What a limited line brings in so many seconds may wait to be read: as much as long round trips need."""

_LEAST_BUFFER_BYTES, _MOST_BUFFER_BYTES = 16 * 1024, 200_000
"""Of one socket. Linux grants no more than the latter where nobody has changed that, and takes about as much by itself
while it is read slowly."""


class Door:
    """Accepts connections on a socket until it is closed."""

    def __init__(self, sock: socket.socket, make: Make, context: ssl.SSLContext) -> None:
        """make: a protocol for each that shows a certificate that the context takes."""
        self.sockets = (sock,)
        self._make, self._context = make, context
        self._handshakes: dict[asyncio.Task[None], tuple[str, float]] = {}  # host, and since when; oldest first
        self._accepting = asyncio.create_task(self._accept(sock))

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while len(self._handshakes) >= MAX_HANDSHAKES:
                await self._make_room()
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:  # as too many open files
                log.warning("A connection for bulk cannot be accepted: %s.", error.strerror or error)
                await asyncio.sleep(_REST_S)
                continue
            task = asyncio.create_task(self._let_in(sock))
            self._handshakes[task] = (address[0], loop.time())
            task.add_done_callback(self._handshakes.pop)

    async def _make_room(self) -> None:
        """Wait until a handshake is over, one way or another, or is old enough to be given up."""
        busiest = Counter(host for host, _ in self._handshakes.values()).most_common(1)[0][0]
        oldest, since = next((task, since) for task, (host, since) in self._handshakes.items() if host == busiest)
        seconds = since + PRESSED_S - asyncio.get_running_loop().time()
        if seconds <= 0:
            oldest.cancel()
        await asyncio.wait(self._handshakes, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)

    async def _let_in(self, sock: socket.socket) -> None:
        """The socket is asyncio's from here on: it may go on with a handshake that was cancelled as it began."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # ssl.SSLError is one, and so is TimeoutError
            await loop.connect_accepted_socket(self._make, sock, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_S)

    def close(self) -> None:
        """Stop listening, and give up what has not come in."""
        asyncio.get_running_loop().remove_reader(self.sockets[0])  # before another socket has its number
        self.sockets[0].close()
        self._accepting.cancel()
        for task in self._handshakes:
            task.cancel()


async def listen(make: Make, host: str, port: int, context: ssl.SSLContext) -> Door:
    """A Door on this IP address and port, 0 for any. Raises OSError."""
    sock = socket.socket(family_of(host), socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tune(sock)  # what is accepted inherits it
        sock.bind((host, port))
        sock.listen(_BACKLOG)
        return Door(sock, make, context)
    except BaseException:
        sock.close()
        raise


def family_of(host: str) -> socket.AddressFamily:
    """Of an IP address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def tune(sock: socket.socket) -> None:
    """BBR, where the system lets us: one lost packet in 200 leaves the usual control a tenth of a line."""
    if hasattr(socket, "TCP_CONGESTION"):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


def buffer_little(transports: Collection[asyncio.BaseTransport], mbit: float) -> None:
    """Let no more wait to be read, on all of these, than a line of this rate brings in a moment.

    Kernels would take megabytes as fast as they come, whatever the rate at which they are read.
    """
    count = max(_LEAST_BUFFER_BYTES, int(mbit * 1e6 / 8 * _BUFFER_S / max(1, len(transports))))
    for transport in transports:
        sock = transport.get_extra_info("socket")
        if sock is not None and count <= _MOST_BUFFER_BYTES:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, count)
        if hasattr(transport, "set_read_buffer_limits"):  # asyncio's for TLS
            transport.set_read_buffer_limits(high=count)
