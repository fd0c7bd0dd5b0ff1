"""Fetching large things from a peer by name: states, aggregates, tokenizers.

One stream a fetch: the request, a bounded header that says what comes, then the raw bytes. The receiver states
the most it will take before it asks, allocates nothing larger, and checks the content itself (its digest is
known from elsewhere); this module only moves bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from p2pllm.errors import NetworkError
from p2pllm.network.messages import pack, unpack
from p2pllm.network.streams import pace
from p2pllm.network.transport import Transport

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 256 * 1024
PIECE_BYTES = 256 * 1024
REQUEST_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 20.0
"""A fetch in which no piece arrives for this long has failed."""

MAX_CONCURRENT = 16
"""Fetches that we serve at once; more wait."""

MAX_OPEN = 64
"""Fetches that are served or wait; more are refused, and so are more than MAX_OPEN_PER_PEER of one peer."""

MAX_OPEN_PER_PEER = 16

SLOWEST_BYTES_PER_S = 20_000
"""A transfer that is slower than this on the whole is broken off."""

_LENGTH = struct.Struct("!I")
_SIZE = struct.Struct("!Q")


@dataclass(frozen=True)
class Blob:
    """What is served: a small header (msgpack types) and buffers that follow each other."""

    header: dict[str, Any]
    buffers: Sequence[memoryview | bytes] = field(default=())

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(memoryview(buffer).nbytes for buffer in self.buffers)


Source = Callable[[dict[str, Any]], Awaitable[Blob | None]]
"""Request -> blob, or None if we do not have it."""


class BulkServer:
    """Serves blobs to whoever asks."""

    def __init__(self, transport: Transport, source: Source) -> None:
        self._transport = transport
        self._source = source
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._open: Counter[str] = Counter()

    async def start(self) -> None:
        """Begin to answer."""
        await self._transport.serve_stream("fetch", self._on_stream)

    async def _on_stream(self, peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        if self._open.total() >= MAX_OPEN or self._open[peer] >= MAX_OPEN_PER_PEER:
            return  # the stream is closed, which the other side sees as a failed transfer
        self._open[peer] += 1
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = _unpack(await _read_framed(reader))
            with contextlib.suppress(AttributeError, RuntimeError):
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # nothing more is to come
            async with self._slots:
                blob = await self._source(request)
                async with asyncio.timeout(_longest(blob.size if blob else 0)):
                    await _send(writer, blob)
        except (TimeoutError, OSError, EOFError, ValueError) as error:
            log.debug("a fetch of %s ended: %s", peer[-8:], str(error) or "it stalled")
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


async def _send(writer: StreamWriter, blob: Blob | None) -> None:
    """Header, size, buffers. Raises TimeoutError when a piece is not taken in time."""
    async with asyncio.timeout(STALL_TIMEOUT_S):
        _write_framed(writer, {"found": False} if blob is None else {"found": True, **blob.header})
        writer.write(_SIZE.pack(0 if blob is None else blob.size))
        await writer.drain()
    for buffer in blob.buffers if blob else ():
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            await pace(writer)
            async with asyncio.timeout(STALL_TIMEOUT_S):
                writer.write(view[start : start + PIECE_BYTES])
                await writer.drain()


async def fetch(
    transport: Transport,
    peer: str,
    request: dict[str, Any],
    max_bytes: int,
) -> tuple[dict[str, Any], bytearray] | None:
    """Ask `peer` for a blob of at most `max_bytes` bytes; None if it does not have it.

    Raises NetworkError if the peer fails, stalls, is slower than SLOWEST_BYTES_PER_S, or announces more than
    `max_bytes`.
    """
    reader, writer = await transport.open_stream(peer, "fetch")
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            _write_framed(writer, request)
            await writer.drain()
        # The answer may queue behind other fetches at the peer, so it gets the longer bound.
        async with asyncio.timeout(STALL_TIMEOUT_S):
            header = _unpack(await _read_framed(reader))
            (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
        if header.pop("found", False) is not True:
            return None
        if size > max_bytes:
            raise NetworkError(f"Peer {peer[-8:]} announced {size} bytes where at most {max_bytes} can be right.")
        body = bytearray(size)
        view = memoryview(body)
        async with asyncio.timeout(_longest(size)):
            for start in range(0, size, PIECE_BYTES):
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    piece = await reader.readexactly(min(PIECE_BYTES, size - start))
                view[start : start + len(piece)] = piece
        return header, body
    except (TimeoutError, OSError, EOFError, ValueError) as error:
        raise NetworkError(f"Peer {peer[-8:]} broke off a transfer: {str(error) or 'it stalled'}.") from None
    finally:
        writer.close()


def _longest(size: int) -> float:
    """Seconds that a transfer of `size` bytes may take, so that a trickle holds nobody for good."""
    return STALL_TIMEOUT_S + size / SLOWEST_BYTES_PER_S


def _write_framed(writer: StreamWriter, value: dict[str, Any]) -> None:
    packed = pack(value)
    writer.write(_LENGTH.pack(len(packed)))
    writer.write(packed)


async def _read_framed(reader: StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes is too long")
    return await reader.readexactly(length)


def _unpack(data: bytes) -> dict[str, Any]:
    value = unpack(data, MAX_HEADER_BYTES)
    if not isinstance(value, dict):
        raise ValueError("a header is not a map")
    return value
