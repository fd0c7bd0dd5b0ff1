"""Streams in memory: two ends of a pipe as asyncio transports, in order, with latency and backpressure.

What is written leaves at once and arrives after the latency of its path. At most WINDOW_BYTES are on their way or
wait to be read before the writer has to wait, so a reader that stops reading stops its writer, as over TCP. What
does not live here: who may talk to whom (`network`).
"""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections import deque
from typing import TYPE_CHECKING, Any

from p2pllm.testing.clock import TICK_S

if TYPE_CHECKING:
    from p2pllm.testing.host import MemoryHost

WINDOW_BYTES = 1 << 15
"""Bytes on their way beyond which a writer waits; a single write may be larger."""

_SEGMENT = 1 << 14  # a reader that is full takes no more than this of a large write
_READER_LIMIT = 1 << 14  # a StreamReader holds twice as much before it stops reading


class Pipe(asyncio.Transport):
    """One end of a stream; `other` is the far one."""

    other: Pipe

    def __init__(self, host: MemoryHost, method: str) -> None:
        super().__init__()
        self.host = host
        self.reader = StreamReader(limit=_READER_LIMIT)
        self._protocol = StreamReaderProtocol(self.reader)
        self._method = method
        self._loop = asyncio.get_running_loop()
        self._sent: deque[tuple[float, bytes | None]] = deque()  # when it arrives, and what; None is the end
        self._size = 0
        self._closing = False
        self._full = False  # our writer waits
        self._reading = True
        self._told_end = False
        self._protocol.connection_made(self)
        host.pipes[self] = None

    def writer(self) -> StreamWriter:
        """A StreamWriter on this end."""
        return StreamWriter(self, self._protocol, self.reader, self._loop)

    # -- what asyncio asks of a transport ----------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        """Send; dropped if this end is closed. If the far end is, this one breaks, too."""
        if self._closing or not len(data):
            return
        if self._told_end:
            self._lose()
            return
        data = bytes(data)
        self._size += len(data)
        self._send(data)
        if self._size > WINDOW_BYTES and not self._full:
            self._full = True
            self._protocol.pause_writing()
        self.host.wrote(self._method, len(data))

    def can_write_eof(self) -> bool:
        """There is no half-closed state."""
        return False

    def is_closing(self) -> bool:
        """Whether this end was closed, or broke."""
        return self._closing

    def is_reading(self) -> bool:
        """Whether it takes what comes."""
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        """Take nothing more; what was sent stays on its way."""
        self._reading = False

    def resume_reading(self) -> None:
        """Go on taking."""
        self._reading = True
        # Not now: a StreamReader resumes before it waits, and would not notice what comes at once.
        self._loop.call_soon(self.other.deliver, context=self.host.network.context)

    def close(self) -> None:
        """Close both directions; what was written still arrives, then the end."""
        if not self._closing and not self._loop.is_closed():  # a StreamWriter closes when it is forgotten
            self._lose()
            self._send(None)

    def abort(self) -> None:
        """Close and drop what has not arrived."""
        if not self._closing:
            self._sent.clear()
            self._size = 0
            self._lose()
            self._send(None)

    # -- under way ---------------------------------------------------------------------------------------------------

    def _send(self, data: bytes | None) -> None:
        network = self.host.network
        due = self._loop.time() + network.delay(self.host, self.other.host)
        if data is None:
            self._sent.append((due, None))
        else:
            self._sent.extend((due, data[at : at + _SEGMENT]) for at in range(0, len(data), _SEGMENT))
        network.later(due, Pipe.deliver, self)

    def deliver(self) -> None:
        """Hand over what has arrived, unless the path hangs or the far end does not read.

        What jitter would let overtake waits for what was written before it.
        """
        far, now = self.other, self._loop.time() + TICK_S
        while self._sent and self._sent[0][0] <= now:
            data = self._sent[0][1]
            if not far._reading and data is not None and not far._closing:
                return
            if self.host.network.hangs(self.host, far.host):
                self.host.network.stuck[self] = None
                return
            self._sent.popleft()
            self._size -= len(data or b"")
            far._take(data)
        if self._full and self._size <= WINDOW_BYTES // 2:
            self._full = False
            self._protocol.resume_writing()

    def _take(self, data: bytes | None) -> None:
        if self._closing:
            return
        if data is not None:
            self.host.got(self._method, len(data))
            self.reader.feed_data(data)
            return
        self._told_end = True
        self.reader.feed_eof()
        if self._sent:  # nobody will ever take it
            self._lose()

    def _lose(self) -> None:
        self._closing = True
        self.host.pipes.pop(self, None)
        self._protocol.connection_lost(None)
