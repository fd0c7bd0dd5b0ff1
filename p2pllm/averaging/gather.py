"""Gather: every member of a group gets every other one's update, whole, and knows it by the digest that it signed.

Each takes the others' updates from who made them, or from whoever else has them by then; nobody has to be trusted with
a sum. A stream asks for one update by group and digest, and is answered with its length and its bytes. What does not
live here: what an update holds (`sparse`), the mean of them (`form`), and what happens after a failure (`rounds`).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter, OrderedDict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from blake3 import blake3

from p2pllm.averaging.group import GROUP_ID_BYTES, Group
from p2pllm.averaging.patience import Patience
from p2pllm.errors import NetworkError
from p2pllm.network.streams import pace
from p2pllm.network.transport import Transport

STREAM_METHOD = "gather/1"

GIVE_S = 20.0
"""A member that takes nothing of what it asked for during this time gets no more of it."""

_DIGEST_BYTES = 32
_PIECE_BYTES = 64 * 1024
_LENGTH = struct.Struct("!I")
_NOTHING = 0xFFFFFFFF  # for a length: we do not have it

_KEPT = 4
"""Groups whose updates are still given to slower members after we have them all."""

_MAX_OPEN, _MAX_OPEN_PER_PEER = 512, 4
_HEADER_S = 10.0

T = TypeVar("T")


@dataclass
class _Updates:
    """The updates of one group that are here, by digest."""

    members: frozenset[str]
    by_digest: dict[bytes, bytes]
    expected: int  # about how large another one is
    missing: dict[bytes, str] = field(default_factory=dict)  # digest -> who made it


@dataclass(frozen=True)
class Gathered:
    """What came of one exchange, as seen by one member; see ExchangeResult for what both have."""

    updates: list[bytes]  # in the order of the roster; none if one is missing
    failed: frozenset[str]
    reason: str
    bytes_sent: int
    bytes_received: int
    seconds: dict[str, float]


class Gather:
    """Exchanges updates over a Transport, several groups at once if need be.

    max_bytes: of one update. stall_timeout: seconds of silence after which a peer has failed, until there is a measure
    of how long they are silent and go on. pending_timeout: seconds that a faster peer's request waits for us to begin.
    """

    def __init__(
        self, transport: Transport, max_bytes: int, *, stall_timeout: float = 5.0, pending_timeout: float = 30.0
    ) -> None:
        self._transport = transport
        self._max_bytes = max_bytes
        self._patience = Patience(stall_timeout)
        self._pending_timeout = pending_timeout
        self._groups: OrderedDict[bytes, _Updates] = OrderedDict()
        self._next_begin = asyncio.Event()
        self._open: Counter[str] = Counter()
        self._silence = 0.0  # longest one of the exchange that runs
        self._sent = 0

    async def start(self) -> None:
        """Answer other members."""
        await self._transport.serve_stream(STREAM_METHOD, self._on_stream)

    async def run(self, group: Group, payload: bytes, deadline: float) -> Gathered:
        """Get all updates of `group` within `deadline` seconds; see Gathered.

        payload: our own update. Raises ValueError if the group does not name it as ours, or was run before.
        """
        begun, sent = time.perf_counter(), self._sent
        updates = self._begin(group, payload)
        wanted, reasons = dict(updates.missing), dict[str, str]()

        async def get(digest: bytes, maker: str) -> None:
            if why := await self._get(group, updates, digest, maker):
                reasons[maker] = why

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                await asyncio.gather(*(get(digest, maker) for digest, maker in wanted.items()))
        late = {maker: f"The update of {maker} did not come in time." for maker in updates.missing.values()}
        reasons = late | reasons
        if not reasons:
            self._patience.note(self._silence)
        return Gathered(
            updates=[] if reasons else [updates.by_digest[digest] for digest in group.digests],
            failed=frozenset(reasons),
            reason=next(iter(reasons.values()), ""),
            bytes_sent=self._sent - sent,
            bytes_received=sum(len(updates.by_digest.get(digest, b"")) for digest in wanted),
            seconds={"total": time.perf_counter() - begun},
        )

    def _begin(self, group: Group, payload: bytes) -> _Updates:
        me = self._transport.peer_id
        digest = blake3(payload).digest()
        if dict(zip(group.members, group.digests, strict=True)).get(me) != digest:
            raise ValueError("The group names another update than ours, or none.")
        if group.group_id in self._groups:
            raise ValueError("This group was run before; every attempt needs a new group id.")
        missing = {its: member for member, its in zip(group.members, group.digests, strict=True) if its != digest}
        updates = _Updates(frozenset(group.members), {digest: payload}, len(payload), missing)
        self._groups[group.group_id] = updates
        while len(self._groups) > _KEPT:
            self._groups.popitem(last=False)
        self._next_begin.set()
        self._next_begin = asyncio.Event()
        self._silence = 0.0
        return updates

    # -- asking ------------------------------------------------------------------------------------------------------

    async def _get(self, group: Group, updates: _Updates, digest: bytes, maker: str) -> str:
        """Fetch one update, from who made it or else from another one; what went wrong with its maker, or nothing."""
        why = ""
        others = (member for member in group.members if member not in (maker, self._transport.peer_id))
        for peer in (maker, *others):
            try:
                data = await self._take(peer, group.group_id + digest, updates.expected)
            except (NetworkError, OSError, EOFError, TimeoutError) as error:
                why = why or f"{peer} does not give its update: {str(error).rstrip('.') or 'it is silent'}."
                continue
            if data is not None and blake3(data).digest() == digest:
                updates.by_digest[digest] = data
                del updates.missing[digest]
                return ""
            why = why or f"{peer} gives another update than it signed, or none."
        return why

    async def _take(self, peer: str, request: bytes, expected: int) -> bytes | None:
        """The bytes that `peer` answers with; None if it has none."""
        reader, writer = await self._noting(self._transport.open_stream(peer, STREAM_METHOD, expected))
        try:
            writer.write(request)
            await self._noting(writer.drain())
            (length,) = _LENGTH.unpack(await self._noting(reader.readexactly(_LENGTH.size)))
            if length == _NOTHING:
                return None
            if length > self._max_bytes:
                raise NetworkError(f"it announced {length} bytes where at most {self._max_bytes} can be right")
            data = bytearray()
            while len(data) < length:
                piece = await self._noting(reader.read(min(length - len(data), _PIECE_BYTES)))
                if not piece:
                    raise EOFError("the stream ended early")
                data += piece
            return bytes(data)
        finally:
            writer.close()

    async def _noting(self, work: Awaitable[T]) -> T:
        """Wait for one thing of a peer, and note how long it was silent. Raises TimeoutError when that is too long."""
        clock = asyncio.get_running_loop().time
        begun = clock()
        async with asyncio.timeout(self._patience.seconds):
            result = await work
        self._silence = max(self._silence, clock() - begun)
        return result

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _on_stream(self, caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        if self._open[caller] >= _MAX_OPEN_PER_PEER or self._open.total() >= _MAX_OPEN:
            return  # the stream is closed, which the other side sees
        self._open[caller] += 1
        try:
            async with asyncio.timeout(_HEADER_S):
                request = await reader.readexactly(GROUP_ID_BYTES + _DIGEST_BYTES)
            updates = await self._await_begin(request[:GROUP_ID_BYTES])
            known = caller in updates.members
            await self._give(writer, updates.by_digest.get(request[GROUP_ID_BYTES:]) if known else None)
        except (TimeoutError, OSError, EOFError):
            return
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]

    async def _await_begin(self, group_id: bytes) -> _Updates:
        """The updates of a group, once we take part in it. Raises TimeoutError if we do not soon."""
        async with asyncio.timeout(self._pending_timeout):
            while group_id not in self._groups:
                await self._next_begin.wait()
        return self._groups[group_id]

    async def _give(self, writer: StreamWriter, data: bytes | None) -> None:
        if writer.get_extra_info("socket") is not None:
            # else a piece would wait until a whole buffer has left
            writer.transport.set_write_buffer_limits(high=_PIECE_BYTES)
        writer.write(_LENGTH.pack(_NOTHING if data is None else len(data)))
        for at in range(0, len(data or b""), _PIECE_BYTES):
            piece = (data or b"")[at : at + _PIECE_BYTES]
            await pace(writer, len(piece))
            writer.write(piece)
            self._sent += len(piece)
            async with asyncio.timeout(GIVE_S):
                await writer.drain()
        async with asyncio.timeout(GIVE_S):
            await writer.drain()
