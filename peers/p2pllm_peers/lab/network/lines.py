"""When each frame passes the middle of the network: rates, delays, jitter, losses, cuts and NAT of all lines.

Pure but for a seeded random generator: times come in, frames go out through a callable. A frame from one peer to
another passes, in this order: the losses of both lines; the sender's line at its rate; the delays of both lines, with
their jitter, in which it never overtakes another frame of its pair; the receiver's NAT; the receiver's line at its
rate. Before each rate waits at most `QUEUE_S` of traffic; a frame that comes on top is dropped, as in a router (a
super-segment whole: its packets would come to the full queue in one row).

All times in seconds on one clock, sizes in bytes on the wire. What does not live here: devices (`box`), the bytes of
frames (`frames`).
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Sequence
from heapq import heappop, heappush, heapreplace

from p2pllm_peers.lab.network import frames
from p2pllm_peers.lab.network.frames import DESTINATION, PLAIN, packets

QUEUE_S = 0.2
"""What a router holds before a line; a slow home router holds more, a good one less."""

FLOW_IDLE_S = 300.0
"""A NAT forgets a flow that was silent for so long; TCP between peers says something more often."""

HELD_LIMIT = 1 << 29
"""Bytes held in all. Queues are bounded by their lines; this bounds what is in flight on fast and long ones."""

EARLY_S = 100e-6
"""What is due so soon is handed over at once, which makes up for a part of the box's rest after each turn."""

_LEAST_MS = 0.05
LATE_BOUNDS_MS = [_LEAST_MS * 1.25**step for step in range(60)]
"""Upper bounds of the classes in which latenesses are counted: 0.05 ms to 26 s, each a quarter wider."""


_UnderWay = tuple[float, int, "Path", bytes, int, int, float]
"""A frame between two lines: when its last packet reaches the receiver's, the sender's number (it settles ties: a heap
has one frame of each sender), path, frame, packets, bytes, and how much earlier its first packet is there."""


class Line:
    """One peer's line: its parameters, when it is free again in each direction, and what crossed it."""

    __slots__ = (
        "arriving", "crossing", "delay_s", "down_free", "down_s_per_byte", "flows", "jitter_s", "loss", "nat", "number",
        "paths", "received", "sent", "up_free", "up_s_per_byte",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.up_s_per_byte = self.down_s_per_byte = self.delay_s = self.jitter_s = self.loss = 0.0
        self.nat = False
        self.up_free = self.down_free = 0.0
        self.sent = self.received = 0
        self.paths: dict[bytes, Path] = {}  # by the receiver's address
        self.flows: dict[frames.Flow, float] = {}  # begun by this peer: when their last packets passed
        self.arriving: list[_UnderWay] = []  # a heap: from each peer the frame that arrives here next
        self.crossing: list[tuple[float, bytes, int]] = []  # to this peer, in order: when each is due, frame, bytes

    def passes_nat(self, frame: bytes, now: float) -> bool:
        """An incoming frame belongs to a flow that this peer began and that is not forgotten yet."""
        flow = frames.incoming(frame)
        if flow is None or self.flows.get(flow, -math.inf) <= now - FLOW_IDLE_S:
            return False
        self.flows[flow] = now
        return True

    def note_flow(self, frame: bytes, now: float) -> None:
        """The peer sent this: what answers it may pass. Forgotten flows are dropped when there are many."""
        if (flow := frames.outgoing(frame)) is not None:
            self.flows[flow] = now
            if len(self.flows) > 4096:
                self.flows = {key: last for key, last in self.flows.items() if last > now - FLOW_IDLE_S}


class Path:
    """From one peer to another: what follows from both their lines, and the frames between these."""

    __slots__ = ("blocked", "delay_s", "jitters", "last", "loss", "other", "source", "spared", "under_way")

    def __init__(self, source: int, other: Line) -> None:
        self.source, self.other = source, other
        self.delay_s = self.loss = self.last = 0.0
        self.jitters: tuple[float, ...] = ()
        self.blocked = False
        self.spared = math.inf  # so many packets pass before the next is lost
        self.under_way: deque[_UnderWay] = deque()  # in order: nothing overtakes

    def follow(self, line: Line) -> None:
        """Take over what one of the two lines has become."""
        self.delay_s = line.delay_s + self.other.delay_s
        self.loss = line.loss + self.other.loss - line.loss * self.other.loss
        self.jitters = tuple(jitter for jitter in (line.jitter_s, self.other.jitter_s) if jitter)


class Lines:
    """All lines and the frames on them. `send(peer, frame)` hands a frame over to the peer of that number."""

    def __init__(
        self,
        addresses: Sequence[bytes],
        send: Callable[[int, bytes], None],
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """addresses: the IPv4 address of each peer, 4 bytes, in the order of their numbers."""
        self.lines = [Line(number) for number in range(len(addresses))]
        for line in self.lines:
            line.paths = {addresses[other.number]: Path(line.number, other) for other in self.lines}
        self.frames = self.dropped = 0
        self.late_counts = [0] * (len(LATE_BOUNDS_MS) + 1)
        self.late_max_ms = 0.0
        self._addresses = addresses
        self._send = send
        self._clock = clock
        self._random = random.Random(seed).random  # noqa: S311 - losses, not secrets
        self._held_bytes = 0

    def change(
        self, peer: int, up_mbit: float, down_mbit: float, delay_ms: float, jitter_ms: float, loss: float, nat: bool
    ) -> None:
        """Give a peer another line; a rate of 0 is no limit. Frames that wait already keep their times."""
        line = self.lines[peer]
        line.up_s_per_byte = 8e-6 / up_mbit if up_mbit else 0.0
        line.down_s_per_byte = 8e-6 / down_mbit if down_mbit else 0.0
        line.delay_s, line.jitter_s = delay_ms / 1e3, jitter_ms / 1e3
        line.loss, line.nat = loss, nat
        for sender in self.lines:
            for path in sender.paths.values():
                path.follow(sender)
                path.spared = self._spared(path.loss)  # chance has no memory: a new draw is as good

    def block(self, pairs: Collection[tuple[int, int]]) -> None:
        """From now on exactly what goes (from, to) vanishes."""
        for line in self.lines:
            for path in line.paths.values():
                path.blocked = (line.number, path.other.number) in pairs

    def take(self, source: int, frame: bytes) -> None:
        """A frame that `source` sends now."""
        now = self._clock()
        line = self.lines[source]
        count, size = packets(frame) if frame[1] else (1, len(frame) + PLAIN)
        if line.up_free - now > QUEUE_S or self._held_bytes > HELD_LIMIT:
            self.dropped += count
            return
        line.sent += size
        if line.nat:
            line.note_flow(frame, now)
        path = line.paths.get(frame[DESTINATION])
        if path is None or path.blocked:
            return
        if path.spared < count:
            for piece in self._survivors(path, frame, count):
                self._leave(now, line, path, piece, *packets(piece))
            return
        path.spared -= count
        self._leave(now, line, path, frame, count, size)

    def deliver(self) -> float | None:
        """Hand over everything that is due; returns the seconds until the next frame is, None if none is held."""
        soonest = math.inf
        for line in self.lines:
            until = self._clock() + EARLY_S
            if line.arriving and line.arriving[0][0] <= until:
                self._enter(line, until)
            if line.crossing and line.crossing[0][0] <= until:
                self._hand_over(line, until)
            if line.arriving:
                soonest = min(soonest, line.arriving[0][0])
            if line.crossing:
                soonest = min(soonest, line.crossing[0][0])
        return None if soonest == math.inf else max(0.0, soonest - EARLY_S - self._clock())

    def late_p99_ms(self) -> float:
        """Upper bound of the lateness of 99 % of the frames handed over so far."""
        beyond = sum(self.late_counts) * 0.01
        for count, bound in zip(reversed(self.late_counts), [math.inf, *reversed(LATE_BOUNDS_MS)], strict=True):
            beyond -= count
            if beyond < 0:
                return min(bound, self.late_max_ms)
        return 0.0

    def _leave(self, now: float, line: Line, path: Path, frame: bytes, count: int, size: int) -> None:
        """A frame crosses the sender's line and sets out."""
        whole = size * line.up_s_per_byte
        line.up_free = done = (line.up_free if line.up_free > now else now) + whole
        arrival = done + path.delay_s
        for jitter in path.jitters:
            arrival += jitter * self._random()
        if arrival < path.last:
            arrival = path.last
        path.last = arrival
        self._held_bytes += size
        one = (arrival, path.source, path, frame, count, size, whole - whole / count)
        if not path.under_way:
            heappush(path.other.arriving, one)
        path.under_way.append(one)

    def _enter(self, line: Line, until: float) -> None:
        """Frames that reach the receiver's line by then begin to cross it. Their packets came one after the other: the
        first of a super-segment may have gone on before the last one was here."""
        arriving, crossing, nat = line.arriving, line.crossing, line.nat
        s_per_byte, free = line.down_s_per_byte, line.down_free
        while arriving:
            due, _, path, frame, count, size, lag = arriving[0]
            if due > until:
                break
            under_way = path.under_way
            under_way.popleft()
            if under_way:
                heapreplace(arriving, under_way[0])
            else:
                heappop(arriving)
            if (nat and not line.passes_nat(frame, due)) or free - due > QUEUE_S:
                self.dropped += count
                self._held_bytes -= size
                continue
            whole = size * s_per_byte
            if free < due - lag:
                free = due - lag
            free += whole
            if free < due + whole / count:
                free = due + whole / count
            crossing.append((free, frame, size))
        line.down_free = free

    def _hand_over(self, line: Line, until: float) -> None:
        """Frames that have crossed the receiver's line by then are there."""
        number, send, clock, late_counts = line.number, self._send, self._clock, self.late_counts
        gone = gone_bytes = 0
        latest_ms = 0.0
        for due, frame, size in line.crossing:
            if due > until:
                break
            late_ms = (clock() - due) * 1e3
            send(number, frame)
            gone += 1
            gone_bytes += size
            late_counts[bisect_left(LATE_BOUNDS_MS, late_ms)] += 1
            if late_ms > latest_ms:
                latest_ms = late_ms
        del line.crossing[:gone]
        line.received += gone_bytes
        self.frames += gone
        self._held_bytes -= gone_bytes
        if latest_ms > self.late_max_ms:
            self.late_max_ms = latest_ms

    def _survivors(self, path: Path, frame: bytes, count: int) -> list[bytes]:
        """What the losses of a path leave of a frame of so many packets."""
        lost = set()
        while path.spared < count:
            lost.add(int(path.spared))
            path.spared += 1 + self._spared(path.loss)
        path.spared -= count
        self.dropped += len(lost)
        return frames.without(frame, lost)

    def _spared(self, loss: float) -> float:
        """How many packets pass before the next is lost, if each is with this probability: one draw for all of them."""
        return math.log(1 - self._random()) // math.log1p(-loss) if loss else math.inf
