"""Attempt: one butterfly all-reduce of one group, from the first stream to the last, as one member sees it.

Reduce-scatter and all-gather over the same streams: member i reduces span i of the vector. Everybody opens a stream to
every other member, sends the header and its own values of that member's span, and reads back the mean of it (Thakur et
al., "Optimization of Collective Communication Operations in MPICH", 2005: the direct form, best for long vectors). Long
spans have several such streams, lanes, which take their parts in turn: on a long line the window of one is small for a
while. A mean is encoded once, and its reducer too uses what the others decode, so all members hold the same bits.

What does not live here: finding the attempt of an incoming stream, and telling others that we gave up (`dense`).
"""

from __future__ import annotations

import asyncio
import time
from asyncio import FIRST_COMPLETED, StreamReader, StreamWriter, TaskGroup
from contextlib import suppress

import numpy as np

from p2pllm.averaging.channel import CHUNK_BYTES, Channel, refuse
from p2pllm.averaging.codecs import Floats, codec
from p2pllm.averaging.exchange import in_one
from p2pllm.averaging.group import Group
from p2pllm.averaging.mean import NotFinite, weighted_mean
from p2pllm.averaging.vigil import GaveUp, Vigil, Want, blaming
from p2pllm.network.transport import Transport

STREAM_METHOD = "allreduce/2"
MAGIC = b"p2ar\x01"
HEADER_BYTES = len(MAGIC) + 64
"""Magic and version, group id, digest of the group; the opener's values follow."""

AHEAD_PARTS = 8
"""Parts of our values that a lane sends before their means come back. Else the values would all go first, and on a long
line the means' own connection takes seconds to find out that it is alone."""

ACCEPTED, FINISHED, MISMATCH, REFUSED = b"A", b"F", b"M", b"R"
"""First byte that a reducer answers: go on; we ended this attempt; other terms; not you, or not twice."""


class Attempt:
    """One attempt at one all-reduce; `run` once, then `close`. room: for the mean, float32 (group.size,)."""

    def __init__(
        self,
        transport: Transport,
        group: Group,
        vector: Floats,
        room: Floats,
        *,
        part_elements: int,
        lanes: int = 1,
        stall_timeout: float,
    ) -> None:
        self.group = group
        self.digest = group.digest(part_elements)
        self._lanes = {group.digest(part_elements, lane): lane for lane in range(lanes)}
        self.others = tuple(member for member in group.members if member != transport.peer_id)
        self.channels: list[Channel] = []
        self.seconds = dict.fromkeys(("connect", "encode", "decode", "reduce"), 0.0)
        self.aggregate = room
        self.longest_silence = 0.0
        """The longest time without progress that a member came back from, in seconds."""
        self._transport = transport
        self._me = transport.peer_id
        self._vector = vector
        self._codec = codec(group.codec)
        self._part_elements = part_elements
        self._expected = 2 * self._codec.bytes_for(group.size // len(group.members))  # values there, means back
        self._own = np.empty(min(part_elements, group.size), np.float32)
        self._stall = stall_timeout
        self._vigil = Vigil(stall_timeout)
        self._shares = group.shares()
        loop = asyncio.get_running_loop()
        self._arrivals: dict[tuple[str, int], asyncio.Future[Channel]] = {
            (peer, lane): loop.create_future() for peer in self.others for lane in range(lanes)
        }
        self._interrupted: asyncio.Future[None] = loop.create_future()
        self._over = asyncio.Event()
        self._is_done = False

    # -- from start to end -------------------------------------------------------------------------------

    async def run(self, timeout: float) -> None:
        """Fill `aggregate` within `timeout` seconds or raise GaveUp. Streams are left as they are."""
        clock = asyncio.get_running_loop().time
        until = clock() + timeout
        tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._vigil.watch())]
        try:
            await asyncio.wait([*tasks, self._interrupted], timeout=timeout, return_when=FIRST_COMPLETED)
            self._judge(*tasks)
            self._is_done = True
            self.longest_silence = self._vigil.longest_silence  # what follows is not of the exchange
            await self._linger(min(self._stall / 2, until - clock()))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def interrupt(self, reason: GaveUp) -> None:
        """Make `run` raise `reason`, unless it is over."""
        if not self._interrupted.done():
            self._interrupted.set_exception(reason)

    def close(self) -> None:
        """Drop every stream that still stands; the handlers of incoming ones return.

        Once we are done, whoever is slower than we waited for still gets the means that we have sent.
        """
        for channel in self.channels:
            if self._is_done:
                channel.close()
            else:
                channel.abort()
        for arrival in self._arrivals.values():
            arrival.cancel()
        self._interrupted.cancel()
        self._over.set()

    def _judge(self, work: asyncio.Task[None], watch: asyncio.Task[None]) -> None:
        """Return if the work is done, else raise the best GaveUp that there is."""
        if work.done():
            try:
                work.result()
            except* GaveUp as group:
                failures = [error for error in group.exceptions if isinstance(error, GaveUp)]
                blamed = frozenset[str]().union(*(failure.blamed for failure in failures))
                reason = GaveUp(blamed, in_one(failure.reason for failure in failures))
            else:
                return
            raise reason
        for task in (self._interrupted, watch):
            if task.done():
                task.result()
        raise self._vigil.give_up("When the deadline passed,")

    async def _work(self) -> None:
        started = time.perf_counter()
        async with TaskGroup() as tasks:
            for peer in self.others:
                for digest, lane in self._lanes.items():
                    tasks.create_task(self._exchange_with(peer, digest, lane, tasks))
            arrivals = {key: tasks.create_task(self._arrival(*key)) for key in self._arrivals}
            inbound = {key: await arrival for key, arrival in arrivals.items()}
            self.seconds["connect"] = time.perf_counter() - started
            for lane in self._lanes.values():
                channels = [inbound[peer, lane] for peer in self.others]
                tasks.create_task(self._reduce_lane(lane, channels, tasks))

    async def _linger(self, timeout: float) -> None:
        """Wait until the others have read our last bytes, which they show by closing.

        If one does not, nothing is lost: we hold the aggregate, and it fails or not on its own.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(arrival.result().ended() for arrival in self._arrivals.values()))

    # -- our values to the reducers, their means back --------------------------------------------------------

    async def _exchange_with(self, peer: str, digest: bytes, lane: int, tasks: TaskGroup) -> None:
        with blaming(peer):
            with self._vigil.wait(peer, Want.OPEN).waiting():
                reader, writer = await self._transport.open_stream(peer, STREAM_METHOD, self._expected)
            receiving, sending = self._vigil.wait(peer, Want.PULL), self._vigil.wait(peer, Want.PUSH)
            channel = Channel(reader, writer, receiving, sending)
            self.channels.append(channel)
            await channel.take_over()
            await channel.send(MAGIC + self.group.group_id + digest)
            ahead = asyncio.Semaphore(AHEAD_PARTS)
            push = tasks.create_task(self._push(channel, lane, ahead))
            await self._pull(channel, lane, ahead)
            await push
            channel.close()

    async def _push(self, channel: Channel, lane: int, ahead: asyncio.Semaphore) -> None:
        with blaming(channel.peer):
            for part in self._parts(channel.peer, lane):
                await ahead.acquire()
                await channel.send(self._encode_own(part))

    async def _pull(self, channel: Channel, lane: int, ahead: asyncio.Semaphore) -> None:
        answer = bytearray(1)
        await channel.receive_into(memoryview(answer))
        _check_answer(channel.peer, bytes(answer))
        staging = self._staging()
        for part in self._parts(channel.peer, lane):
            mean = self.aggregate[part]
            await self._receive(channel, mean, staging)
            if not np.isfinite(mean).all():
                raise GaveUp(frozenset({channel.peer}), f"{channel.peer} sent a mean that is not finite.")
            ahead.release()

    # -- the span that we reduce -----------------------------------------------------------------------------

    async def accept(self, caller: str, digest: bytes, reader: StreamReader, writer: StreamWriter) -> None:
        """Take the stream of a member, or refuse it; returns when the attempt no longer needs it."""
        arrival = self._arrivals.get((caller, self._lanes.get(digest, 0)))
        if arrival is None or arrival.done():
            await refuse(REFUSED, reader, writer)
        elif digest not in self._lanes:
            self.interrupt(GaveUp(frozenset({caller}), f"{caller} knows this group on other terms."))
            await refuse(MISMATCH, reader, writer)
        else:
            receiving, sending = self._vigil.wait(caller, Want.INPUT), self._vigil.wait(caller, Want.GIVE)
            channel = Channel(reader, writer, receiving, sending)
            self.channels.append(channel)
            arrival.set_result(channel)
            await self._over.wait()

    async def _arrival(self, peer: str, lane: int) -> Channel:
        with blaming(peer):
            with self._vigil.wait(peer, Want.INPUT).waiting():
                channel = await self._arrivals[peer, lane]
            await channel.take_over()
            await channel.send(ACCEPTED)
        return channel

    async def _reduce_lane(self, lane: int, inbound: list[Channel], tasks: TaskGroup) -> None:
        """Reduce our span part by part; the next part is read while this one is summed and given out."""
        parts = self._parts(self._me, lane)
        slots = [self._buffers(), self._buffers()]
        coming = self._fetch(inbound, parts[:1], slots[0], tasks)
        for at, part in enumerate(parts):
            terms = {channel.peer: await fetched for channel, fetched in zip(inbound, coming, strict=True)}
            coming = self._fetch(inbound, parts[at + 1 : at + 2], slots[(at + 1) % 2], tasks)
            await self._give_out(inbound, self._combine(part, terms))

    def _buffers(self) -> list[tuple[Floats, memoryview]]:
        """For each other member, in roster order, room for a part and for its encoded bytes."""
        length = min(self._part_elements, len(self.group.span(self.group.members.index(self._me))))
        return [(np.empty(length, np.float32), self._staging()) for _ in self.others]

    def _fetch(
        self,
        inbound: list[Channel],
        parts: list[slice],
        buffers: list[tuple[Floats, memoryview]],
        tasks: TaskGroup,
    ) -> list[asyncio.Task[Floats]]:
        async def fetch(channel: Channel, values: Floats, staging: memoryview) -> Floats:
            with blaming(channel.peer):
                await self._receive(channel, values, staging)
            return values

        return [
            tasks.create_task(fetch(channel, values[: part.stop - part.start], staging))
            for part in parts
            for channel, (values, staging) in zip(inbound, buffers, strict=True)
        ]

    def _combine(self, part: slice, terms: dict[str, Floats]) -> memoryview:
        """Write the mean of a part to the aggregate, and return its encoded bytes."""
        mean = self.aggregate[part]
        # Our own values count as the others would get them.
        terms[self._me] = self._decode(self._encode_own(part), self._own[: mean.size])
        started = time.perf_counter()
        try:
            weighted_mean([terms[member] for member in self.group.members], self._shares, mean)
        except NotFinite as error:
            bad = frozenset(self.group.members[index] for index in error.indices)
            raise GaveUp(bad, f"A value that is not finite came from {', '.join(sorted(bad))}.") from None
        self.seconds["reduce"] += time.perf_counter() - started
        data = self._encode(mean)
        if not self._codec.direct:
            self._decode(data, mean)
        return data

    async def _give_out(self, inbound: list[Channel], data: memoryview) -> None:
        for at in range(0, len(data), CHUNK_BYTES):
            for channel in inbound:
                await channel.put(data[at : at + CHUNK_BYTES])
            for channel in inbound:
                with blaming(channel.peer):
                    await channel.flush()

    # -- bytes and values ----------------------------------------------------------------------------

    def _parts(self, peer: str, lane: int) -> list[slice]:
        return self.group.parts(self.group.members.index(peer), self._part_elements)[lane :: len(self._lanes)]

    def _staging(self) -> memoryview:
        """Room for the encoded bytes of one part; none where they go straight to their array."""
        return memoryview(bytearray(0 if self._codec.direct else self._codec.bytes_for(self._part_elements)))

    async def _receive(self, channel: Channel, out: Floats, staging: memoryview) -> None:
        if self._codec.direct:
            await channel.receive_into(out.data.cast("B"))
            return
        data = staging[: self._codec.bytes_for(out.size)]
        await channel.receive_into(data)
        self._decode(data, out)

    def _encode_own(self, part: slice) -> memoryview:
        values = self._vector[part]
        if not np.isfinite(values).all():
            raise GaveUp(frozenset({self._me}), "Our own vector has a value that is not finite.")
        return self._encode(values)

    def _encode(self, values: Floats) -> memoryview:
        started = time.perf_counter()
        data = self._codec.encode(values)
        self.seconds["encode"] += time.perf_counter() - started
        return data

    def _decode(self, data: memoryview, out: Floats) -> Floats:
        started = time.perf_counter()
        self._codec.decode(data, out)
        self.seconds["decode"] += time.perf_counter() - started
        return out


def _check_answer(peer: str, answer: bytes) -> None:
    """Raise GaveUp unless the reducer accepted our stream."""
    if answer == FINISHED:
        raise GaveUp(frozenset(), f"{peer} had already ended this attempt.")
    if answer == MISMATCH:
        raise GaveUp(frozenset({peer}), f"{peer} knows this group on other terms.")
    if answer != ACCEPTED:
        raise GaveUp(frozenset({peer}), f"{peer} refused our stream.")
