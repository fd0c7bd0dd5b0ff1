"""Gather: every member of a group gets every other one's update, whole, and knows it by the digest that it signed.

Each takes the others' updates from who made them, or from whoever else has them by then; nobody has to be trusted with
a sum. A stream asks for one update by group and digest, and is answered with its length and its bytes. What does not
live here: what an update holds (`sparse`), the mean of them (`form`), and what happens after a failure (`rounds`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter, OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from blake3 import blake3

from p2pllm.averaging.exchange import in_one
from p2pllm.averaging.group import GROUP_ID_BYTES, Group
from p2pllm.averaging.patience import CAP_S, Patience
from p2pllm.errors import NetworkError
from p2pllm.network.streams import held, limit_of_upload, pace, take_it_slowly
from p2pllm.network.transport import Transport

STREAM_METHOD = "gather/1"

GIVE_S = 20.0
"""A member that takes nothing of what it asked for during this time gets no more of it."""

_DIGEST_BYTES = 32
_LEAST_PIECE_BYTES, _PIECE_BYTES = 2 * 1024, 64 * 1024
_TURN_S = 0.5
"""Where this machine sends no faster than a set rate, pieces are so small that in this time all who ask get one, and
nobody takes it for silent."""

_LENGTH = struct.Struct("!I")
_NOTHING = 0xFFFFFFFF  # for a length: we do not have it

_KEPT = 2
"""Groups whose updates are kept: the one that runs, and the one before, which slower members may still ask for. That is
at most twice an update's `max_bytes` for every member."""

_MAX_OPEN, _MAX_OPEN_PER_PEER, _MAX_OPEN_TO_OTHERS = 256, 4, 64
"""Streams that are answered at a time; those of who is in none of the kept groups, and may be in the next, are fewer.
After its request nothing more of a stream is taken, and what came with it is 0.5 MiB at most."""

_HEADER_S = 10.0

T = TypeVar("T")


@dataclass
class _Updates:
    """The updates of one group that are here, by digest."""

    members: frozenset[str]
    by_digest: dict[bytes, bytes]
    expected: int  # about how large another one is
    missing: dict[bytes, str] = field(default_factory=dict)  # digest -> who made it
    silence_s: float = 0.0  # the longest after which somebody came back


@dataclass(frozen=True)
class Gathered:
    """What came of one exchange, as seen by one member; see ExchangeResult for what both have."""

    arrived: dict[str, bytes]  # by who made it, in the order of the roster; those that are missing have failed
    failed: frozenset[str]
    reason: str
    bytes_sent: int
    bytes_received: int
    seconds: dict[str, float]

    @property
    def updates(self) -> list[bytes]:
        """All of them, in the order of the roster; none if one is missing."""
        return [] if self.failed else list(self.arrived.values())


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
        self._late: set[asyncio.Task[None]] = set()
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
        if updates.silence_s:
            self._patience.note(updates.silence_s)
        makers = zip(group.members, group.digests, strict=True)
        return Gathered(
            arrived={maker: updates.by_digest[digest] for maker, digest in makers if digest in updates.by_digest},
            failed=frozenset(reasons),
            reason=in_one(reasons[maker] for maker in group.members if maker in reasons),
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
        return updates

    # -- asking ------------------------------------------------------------------------------------------------------

    async def _get(self, group: Group, updates: _Updates, digest: bytes, maker: str) -> str:
        """Fetch one update, from who made it or else from another one; what went wrong with its maker, or nothing."""
        why = ""
        others = (member for member in group.members if member not in (maker, self._transport.peer_id))
        for peer in (maker, *others):
            try:
                data = await self._take(peer, group.group_id + digest, updates)
            except (NetworkError, OSError, EOFError, TimeoutError) as error:
                why = why or f"{peer} does not give its update: {str(error).rstrip('.') or 'it is silent'}."
                continue
            if data is not None and blake3(data).digest() == digest:
                updates.by_digest[digest] = data
                del updates.missing[digest]
                return ""
            why = why or f"{peer} gives another update than it signed, or none."
        return why

    async def _take(self, peer: str, request: bytes, updates: _Updates) -> bytes | None:
        """The bytes that `peer` answers with; None if it has none."""
        clock = asyncio.get_running_loop().time
        begun = clock()
        async with asyncio.timeout(self._patience.seconds):
            reader, writer = await self._transport.open_stream(peer, STREAM_METHOD, updates.expected)
        updates.silence_s = max(updates.silence_s, clock() - begun)
        closing = contextlib.ExitStack()
        closing.callback(writer.close)

        async def noting(work: Coroutine[Any, Any, T]) -> T:
            return await self._noting(work, updates, closing)

        with closing:
            writer.write(request)
            await noting(writer.drain())
            (length,) = _LENGTH.unpack(await noting(reader.readexactly(_LENGTH.size)))
            if length == _NOTHING:
                return None
            if length > self._max_bytes:
                raise NetworkError(f"it announced {length} bytes where at most {self._max_bytes} can be right")
            data = bytearray()
            while len(data) < length:
                await take_it_slowly(reader)  # for which the other side is not to blame
                piece = await noting(reader.read(min(length - len(data), _PIECE_BYTES)))
                if not piece:
                    raise EOFError("the stream ended early")
                data += piece
            return bytes(data)

    async def _noting(self, work: Coroutine[Any, Any, T], updates: _Updates, closing: contextlib.ExitStack) -> T:
        """Wait for one thing of a peer, and note how long it was silent. Raises TimeoutError when that is too long.

        closing: closes the stream at the end of a block; if the peer is late, only once we know how late it was.
        """
        clock = asyncio.get_running_loop().time
        begun, task = clock(), asyncio.create_task(work)
        try:
            await asyncio.wait([task], timeout=self._patience.seconds)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not task.done():
            learning = asyncio.create_task(self._learn(task, begun, closing.pop_all()))
            self._late.add(learning)
            learning.add_done_callback(self._late.discard)
            raise TimeoutError
        updates.silence_s = max(updates.silence_s, clock() - begun)
        return task.result()

    async def _learn(self, late: asyncio.Task[T], begun: float, closing: contextlib.ExitStack) -> None:
        """Bear with the next one for longer if a peer that we gave up was only slow."""
        clock = asyncio.get_running_loop().time
        with closing:
            await asyncio.wait([late], timeout=max(0.0, begun + CAP_S - clock()))
            if not late.done():
                late.cancel()
            elif not late.cancelled() and late.exception() is None and late.result() != b"":
                self._patience.note(clock() - begun)

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _on_stream(self, caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        if not self._has_room(caller):
            return  # the stream is closed, which the other side sees
        self._open[caller] += 1
        try:
            async with asyncio.timeout(_HEADER_S):
                request = await reader.readexactly(GROUP_ID_BYTES + _DIGEST_BYTES)
            with held(writer):  # nothing more is to come
                updates = await self._await_begin(request[:GROUP_ID_BYTES])
                known = caller in updates.members
                await self._give(writer, updates.by_digest.get(request[GROUP_ID_BYTES:]) if known else None)
            async with asyncio.timeout(GIVE_S):
                await reader.read(1)  # who has all of it closes; TLS would drop what is still under way after a while
        except (TimeoutError, OSError, EOFError):
            return
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]

    def _has_room(self, caller: str) -> bool:
        """Whether one more stream of this caller is answered."""
        groups = self._groups.values()
        others = sum(count for peer, count in self._open.items() if not any(peer in each.members for each in groups))
        return (
            self._open[caller] < _MAX_OPEN_PER_PEER
            and self._open.total() < _MAX_OPEN
            and (others < _MAX_OPEN_TO_OTHERS or not groups or any(caller in each.members for each in groups))
        )

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
        view, at = memoryview(data or b""), 0
        while at < len(view):
            piece = view[at : at + self._piece_bytes(writer)]
            at += len(piece)
            await pace(writer, len(piece))
            writer.write(piece)
            self._sent += len(piece)
            async with asyncio.timeout(GIVE_S):
                await writer.drain()
        async with asyncio.timeout(GIVE_S):
            await writer.drain()

    def _piece_bytes(self, writer: StreamWriter) -> int:
        """So few that all who ask us now get a piece in a moment."""
        a_turn = limit_of_upload(writer) * _TURN_S / max(1, self._open.total())
        return _PIECE_BYTES if math.isinf(a_turn) else max(_LEAST_PIECE_BYTES, min(int(a_turn), _PIECE_BYTES))
