"""Transport: what the rest of the library needs from a network, and no more.

`network.node.Node` is the real one, over p2pd. Anything with these methods serves, so the round protocol and
the all-reduce can run over memory in tests. Nothing here imports hivemind.

Peers are named by their libp2p peer id in base58. The id that a handler is given was authenticated by the
transport.
"""

from __future__ import annotations

from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from typing import Protocol

CallHandler = Callable[[str, bytes], Awaitable[bytes]]
"""(caller's peer id, payload) -> reply; an exception reaches the caller as NetworkError."""

StreamHandler = Callable[[str, StreamReader, StreamWriter], Awaitable[None]]
"""(caller's peer id, reader, writer); the stream is closed when the handler returns."""

MAX_CALL_BYTES = 256 * 1024
"""Bound on the payload and on the reply of a call; anything larger travels in a stream."""

MUCH_BYTES = 128 * 1024
"""Streams that are to carry so much are worth a dial, which costs 1 ms of processor time at either end: as much lies
on a line of 10 Mbit/s for a tenth of a second, and heartbeats would queue behind it. Less travels with the calls."""


class Transport(Protocol):
    """Calls for small messages, streams for bulk."""

    @property
    def peer_id(self) -> str:
        """Our own peer id, base58."""
        ...

    async def call(self, peer: str, method: str, payload: bytes, timeout: float) -> bytes:
        """Send `payload` and return the reply within `timeout` seconds.

        Raises NetworkError: no connection, time-out, a failed handler, or a reply above MAX_CALL_BYTES.
        """
        ...

    async def open_stream(self, peer: str, method: str, expected: int = 0) -> tuple[StreamReader, StreamWriter]:
        """Open a stream of bytes, both ways. Raises NetworkError. The caller closes the writer.

        expected: bytes that are to travel, both ways, on this stream and those that are opened to the peer along with
        it, for which another path may be worth while.
        Who reads from the stream's socket past the reader calls the reader's `hand_over()`, if there is one, and what
        that returns with each number of bytes that came.
        """
        ...

    async def serve_call(self, method: str, handler: CallHandler) -> None:
        """Answer calls of `method` with `handler`."""
        ...

    async def serve_stream(self, method: str, handler: StreamHandler) -> None:
        """Hand streams of `method` to `handler`."""
        ...
