"""DenseAllReduce: the exact weighted mean of one float32 vector over a group of peers, or nothing.

All members end with the same bits, or an attempt fails; a peer's failure is a result, never an exception.
Here live the entry point, the streams that others open to us, and the notice by which who gives up first
tells the rest, so that nobody blames a victim. What does not live here: the exchange itself (`attempt`), who
is in a group, and what happens after a failure (`rounds`).
"""

from __future__ import annotations

import asyncio
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter, OrderedDict
from contextlib import suppress

import numpy as np

from p2pllm.averaging.attempt import FINISHED, HEADER_BYTES, MAGIC, REFUSED, STREAM_METHOD, Attempt
from p2pllm.averaging.channel import refuse
from p2pllm.averaging.codecs import Floats, codec
from p2pllm.averaging.exchange import Exchange, Payload
from p2pllm.averaging.group import GROUP_ID_BYTES, MAX_MEMBERS, ExchangeResult, Group
from p2pllm.averaging.patience import Patience
from p2pllm.averaging.room import Room
from p2pllm.averaging.vigil import GaveUp
from p2pllm.errors import NetworkError
from p2pllm.network.streams import held
from p2pllm.network.transport import Transport
from p2pllm.state import FLOAT

NOTICE_METHOD = f"{STREAM_METHOD}/gave-up"
NOTICE_SECONDS = 1.0
"""Longest time to tell the others that we gave up, within the deadline."""

MAX_LANES = 4
"""Streams to all other members together, but at least one to each: so many fill a long line from the start, and more
cost processor time, as what lies in their buffers leaves the cache."""

MAX_PENDING = MAX_MEMBERS * MAX_LANES
"""Streams, over all peers, whose group we have not started; we stop reading them after their header."""

LANE_BYTES = 2 << 20
"""A member's values of a span, and their mean, go over one stream for so many encoded bytes, as far as there are."""

MAX_PENDING_PER_PEER = 4 * MAX_LANES
HEADER_SECONDS = 10.0
"""How long a stream may take to say which group it belongs to."""

MIN_PART_BYTES, MAX_PART_BYTES = 1 << 16, 1 << 20
PARTS = 256
"""Parts of a span, within these bounds. While the first one comes and the last one goes a line is used in one direction
only; smaller ones cost more processor than that is worth."""

_REMEMBERED = 1024
"""Ids of ended groups that we remember, to answer streams that come too late."""


def lanes_for(group: Group) -> int:
    """Streams from each member to each other one: all come to the same."""
    there_are = MAX_LANES // max(1, len(group.members) - 1)
    return max(1, min(codec(group.codec).bytes_for(group.size // len(group.members)) // LANE_BYTES, there_are))


def part_bytes_for(group: Group) -> int:
    """Bytes that are reduced at a time: all members come to the same."""
    span = FLOAT.itemsize * group.size // len(group.members)
    return max(MIN_PART_BYTES, min(span // PARTS, MAX_PART_BYTES)) // 256 * 256


class DenseAllReduce(Exchange):
    """Runs all-reduces over a Transport, several groups at once if need be.

    transport: streams and calls. stall_timeout: seconds without any progress after which a peer has failed, until
    there is a measure of how long they are silent and come back (see `patience`). part_bytes: float32 bytes that are
    reduced at a time, lanes streams to each other member, both the same at all peers; 0: `part_bytes_for`, `lanes_for`.
    pending_timeout: seconds that the stream of a faster peer waits for us to start.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        stall_timeout: float = 5.0,
        part_bytes: int = 0,
        lanes: int = 0,
        pending_timeout: float = 30.0,
    ) -> None:
        if part_bytes < 0 or part_bytes % 256:
            raise ValueError(f"part_bytes must be a multiple of 256, not {part_bytes}.")
        self._transport = transport
        self._patience = Patience(stall_timeout)
        self._room = Room()
        self._part_bytes, self._lanes = part_bytes, lanes
        self._pending_timeout = pending_timeout
        self._attempts: dict[bytes, Attempt] = {}
        self._accused: dict[bytes, dict[str, frozenset[str]]] = {}
        self._ended: OrderedDict[bytes, None] = OrderedDict()
        self._starts: dict[bytes, asyncio.Future[Attempt]] = {}
        self._pending: Counter[str] = Counter()

    async def start(self) -> None:
        """Register our two methods with the transport."""
        await self._transport.serve_stream(STREAM_METHOD, self._on_stream)
        await self._transport.serve_call(NOTICE_METHOD, self._on_notice)

    async def run(self, group: Group, payload: Payload, deadline: float) -> ExchangeResult:
        """Take part in one all-reduce, for at most `deadline` seconds.

        payload: float32 (group.size,), C-contiguous; it must not change meanwhile and is not changed.
        Raises ValueError if the vector does not fit the group, we are no member, or the group was run before.
        """
        vector = self._checked(group, payload)
        started = time.perf_counter()
        attempt = Attempt(
            self._transport,
            group,
            vector,
            self._room.take(group.size),
            part_elements=(self._part_bytes or part_bytes_for(group)) // FLOAT.itemsize,
            lanes=self._lanes or lanes_for(group),
            stall_timeout=self.stall_timeout,
        )
        self._begin(attempt)
        gave_up: GaveUp | None = None
        try:
            notice_seconds = min(NOTICE_SECONDS, deadline / 8)
            try:
                await attempt.run(deadline - notice_seconds)
            except GaveUp as error:
                gave_up = error
                await self._tell(attempt, error, notice_seconds)
            else:
                self._patience.note(attempt.longest_silence)
        finally:
            attempt.close()
            accused = self._end(group.group_id)
        return ExchangeResult(
            aggregate=attempt.aggregate if gave_up is None else None,
            failed=gave_up.blamed if gave_up else frozenset(),
            reason=gave_up.reason if gave_up else "",
            bytes_sent=sum(channel.sent for channel in attempt.channels),
            bytes_received=sum(channel.received for channel in attempt.channels),
            accused=accused,
            seconds={"total": time.perf_counter() - started, **attempt.seconds},
        )

    @property
    def stall_timeout(self) -> float:
        """Seconds without progress after which a peer has failed, in the next exchange."""
        return self._patience.seconds

    def _checked(self, group: Group, vector: Payload) -> Floats:
        if self._transport.peer_id not in group.members:
            raise ValueError("We are no member of this group.")
        if group.group_id in self._attempts or group.group_id in self._ended:
            raise ValueError("This group was run before; every attempt needs a new group id.")
        if not isinstance(vector, np.ndarray):
            raise ValueError("An all-reduce takes a vector.")
        if vector.dtype != np.float32 or vector.shape != (group.size,) or not vector.flags.c_contiguous:
            raise ValueError(
                f"The vector must be contiguous float32 ({group.size},), not {vector.dtype} {vector.shape}."
            )
        return vector

    def _begin(self, attempt: Attempt) -> None:
        group_id = attempt.group.group_id
        self._attempts[group_id] = attempt
        self._accused[group_id] = {}
        start = self._starts.pop(group_id, None)
        if start is not None and not start.done():
            start.set_result(attempt)

    def _end(self, group_id: bytes) -> dict[str, frozenset[str]]:
        del self._attempts[group_id]
        self._ended[group_id] = None
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        return self._accused.pop(group_id)

    # -- streams that others open --------------------------------------------------------------------

    async def _on_stream(self, caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        """Read the header, find or await the attempt, and leave the stream to it."""
        if self._pending[caller] >= MAX_PENDING_PER_PEER or self._pending.total() >= MAX_PENDING:
            return await refuse(REFUSED, reader, writer)
        self._pending[caller] += 1
        try:
            group_id, digest = await self._read_header(reader)
            with held(writer):
                attempt = await self._await_start(group_id)
        except (TimeoutError, ValueError, ConnectionError, EOFError):
            return await refuse(REFUSED, reader, writer)
        finally:
            self._pending[caller] -= 1
            if not self._pending[caller]:
                del self._pending[caller]
        if attempt is None:
            return await refuse(FINISHED, reader, writer)
        return await attempt.accept(caller, digest, reader, writer)

    async def _read_header(self, reader: StreamReader) -> tuple[bytes, bytes]:
        async with asyncio.timeout(HEADER_SECONDS):
            header = await reader.readexactly(HEADER_BYTES)
        if not header.startswith(MAGIC):
            raise ValueError("This is no stream of an all-reduce.")
        at = len(MAGIC)
        return header[at : at + GROUP_ID_BYTES], header[at + GROUP_ID_BYTES :]

    async def _await_start(self, group_id: bytes) -> Attempt | None:
        """The attempt of a group, once it runs; None if it is over. Raises TimeoutError."""
        if group_id in self._attempts:
            return self._attempts[group_id]
        if group_id in self._ended:
            return None
        start = self._starts.setdefault(group_id, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(self._pending_timeout):
                return await asyncio.shield(start)
        except TimeoutError:
            # Later streams of this group begin a future of their own; those that share this one time out too.
            if self._starts.get(group_id) is start:
                del self._starts[group_id]
            raise

    # -- giving up together --------------------------------------------------------------------------

    async def _tell(self, attempt: Attempt, gave_up: GaveUp, timeout: float) -> None:
        """Tell the others, before our streams close, that we give up and whom we hold responsible."""
        accused = gave_up.blamed.union(*self._accused[attempt.group.group_id].values())
        mask = sum(1 << index for index, member in enumerate(attempt.group.members) if member in accused)
        payload = attempt.group.group_id + attempt.digest + mask.to_bytes(MAX_MEMBERS // 8, "little")

        async def tell(peer: str) -> None:
            with suppress(NetworkError):
                await self._transport.call(peer, NOTICE_METHOD, payload, timeout)

        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(tell(peer) for peer in attempt.others if peer not in gave_up.blamed))

    async def _on_notice(self, caller: str, payload: bytes) -> bytes:
        attempt = self._attempts.get(payload[:GROUP_ID_BYTES])
        if attempt is None or caller not in attempt.others or payload[GROUP_ID_BYTES:-32] != attempt.digest:
            return b""
        mask = int.from_bytes(payload[-32:], "little")
        members = attempt.group.members
        accused = frozenset(member for index, member in enumerate(members) if mask >> index & 1)
        self._accused[attempt.group.group_id].setdefault(caller, accused)
        named = f" because of {', '.join(sorted(accused))}" if accused else ""
        attempt.interrupt(GaveUp(frozenset(), f"{caller} gave up{named}."))
        return b""
