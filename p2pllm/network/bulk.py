"""Fetching large things from a peer by name: states, aggregates, tokenizers.

On a stream of its own: the request, a bounded header that says what comes, then the raw bytes; after that the stream
may carry the next fetch. The receiver states the most it will take before it asks, allocates nothing larger, and
checks the content itself (its digest is known from elsewhere); this module only moves bytes.
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
from p2pllm.network.streams import held, pace
from p2pllm.network.transport import MUCH_BYTES, Transport

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 256 * 1024
PIECE_BYTES = 64 * 1024
"""Bytes that are handed to a stream at a time; at SLOWEST_BYTES_PER_S they leave before a transfer seems to stall."""

REQUEST_TIMEOUT_S = 10.0
"""A stream on which no request comes for this long is closed by who serves it."""

STALL_TIMEOUT_S = 20.0
"""A transfer of which nothing arrives for this long has failed."""

MAX_CONCURRENT = 64
"""Fetches that we serve at once, which is four peers' most; more wait."""

MAX_OPEN = 128
"""Streams that are open to be fetched on; more are refused, and so are more than MAX_OPEN_PER_PEER of one peer."""

MAX_OPEN_PER_PEER = 16

SLOWEST_BYTES_PER_S = 5_000
"""A transfer that is slower than this on the whole is broken off: of a line that does 2 Mbit/s, one that shares it with
fifty others."""

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


Stream = tuple[StreamReader, StreamWriter]

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
            while True:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    request = _unpack(await _read_framed(reader))
                with held(writer):  # nothing more is to come meanwhile
                    async with self._slots:
                        blob = await self._source(request)
                        async with asyncio.timeout(_longest(blob.size if blob else 0)):
                            await _send(writer, blob)
                    del blob  # it is large, and the next request may be long in coming
        except (TimeoutError, OSError, EOFError, ValueError) as error:
            log.debug("a fetch of %s ended: %s", peer[-8:], str(error) or "it stalled")
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


async def _send(writer: StreamWriter, blob: Blob | None) -> None:
    """Header, size, buffers. Raises TimeoutError when a piece is not taken in time."""
    if writer.get_extra_info("socket") is not None:
        # else a piece would wait until a whole buffer has left
        writer.transport.set_write_buffer_limits(high=PIECE_BYTES)
    async with asyncio.timeout(STALL_TIMEOUT_S):
        _write_framed(writer, {"found": False} if blob is None else {"found": True, **blob.header})
        writer.write(_SIZE.pack(0 if blob is None else blob.size))
        await writer.drain()
    for buffer in blob.buffers if blob else ():
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            await pace(writer, len(piece))
            writer.write(piece)
            async with asyncio.timeout(STALL_TIMEOUT_S):
                await writer.drain()


async def fetch(
    transport: Transport, peer: str, request: dict[str, Any], max_bytes: int
) -> tuple[dict[str, Any], bytearray] | None:
    """A single fetch; see `Fetches.fetch`."""
    fetches = Fetches(transport)
    try:
        return await fetches.fetch(peer, request, max_bytes)
    finally:
        fetches.close()


class Fetches:
    """Fetches one after the other or at once, on as few streams: a new one begins with a small window."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._unused: dict[tuple[str, bool], list[Stream]] = {}  # by peer, and whether for much

    def close(self) -> None:
        """Close the streams that are kept for what may be fetched next."""
        for streams in self._unused.values():
            for _, writer in streams:
                writer.close()
        self._unused.clear()

    async def fetch(
        self, peer: str, request: dict[str, Any], max_bytes: int
    ) -> tuple[dict[str, Any], bytearray] | None:
        """Ask `peer` for a blob of at most `max_bytes` bytes; None if it does not have it.

        Raises NetworkError if the peer fails, stalls, is slower than SLOWEST_BYTES_PER_S, or announces more than
        `max_bytes`.
        """
        while (stream := self._kept(peer, max_bytes >= MUCH_BYTES)) is not None:
            with contextlib.suppress(EOFError, OSError):  # it was closed for want of requests
                return await self._fetch(peer, stream, request, max_bytes)
        stream = await self._transport.open_stream(peer, "fetch", max_bytes)
        try:
            return await self._fetch(peer, stream, request, max_bytes)
        except (EOFError, OSError) as error:
            raise _broken_off(peer, error) from None

    def _kept(self, peer: str, for_much: bool) -> Stream | None:
        """A stream that is no longer used; those of all peers that have ended are forgotten."""
        for kind, streams in list(self._unused.items()):
            self._unused[kind] = [stream for stream in streams if not (stream[0].at_eof() or stream[1].is_closing())]
            if not self._unused[kind]:
                del self._unused[kind]
        kept = self._unused.get((peer, for_much))
        return kept.pop() if kept else None

    async def _fetch(
        self, peer: str, stream: Stream, request: dict[str, Any], max_bytes: int
    ) -> tuple[dict[str, Any], bytearray] | None:
        """Raises EOFError and OSError if the stream ends before an answer comes, and NetworkError."""
        reader, writer = stream
        is_whole = False
        try:
            header, size = await _ask(reader, writer, request)
            found = header.pop("found", False) is True
            if size > max_bytes and found:
                raise NetworkError(f"Peer {peer[-8:]} announced {size} bytes where at most {max_bytes} can be right.")
            body = await _read_body(peer, reader, size) if found else bytearray()
            is_whole = found or not size
        except (TimeoutError, ValueError) as error:
            raise _broken_off(peer, error) from None
        finally:
            if is_whole:
                self._unused.setdefault((peer, max_bytes >= MUCH_BYTES), []).append(stream)
            else:
                writer.close()
        return (header, body) if found else None


async def _ask(reader: StreamReader, writer: StreamWriter, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The answer's header, and how many bytes follow. Raises TimeoutError, ValueError, EOFError, OSError."""
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        _write_framed(writer, request)
        await writer.drain()
    # The answer may queue behind other fetches at the peer, so it gets the longer bound.
    async with asyncio.timeout(STALL_TIMEOUT_S):
        header = _unpack(await _read_framed(reader))
        (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
    return header, int(size)


async def _read_body(peer: str, reader: StreamReader, size: int) -> bytearray:
    body = bytearray(size)
    view = memoryview(body)
    try:
        async with asyncio.timeout(_longest(size)):
            at = 0
            while at < size:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    piece = await reader.read(min(PIECE_BYTES, size - at))
                if not piece:
                    raise EOFError(f"{at} of {size} bytes came")
                view[at : at + len(piece)] = piece
                at += len(piece)
    except (TimeoutError, OSError, EOFError) as error:
        raise _broken_off(peer, error) from None
    return body


def _broken_off(peer: str, error: Exception) -> NetworkError:
    return NetworkError(f"Peer {peer[-8:]} broke off a transfer: {str(error) or 'it stalled'}.")


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
