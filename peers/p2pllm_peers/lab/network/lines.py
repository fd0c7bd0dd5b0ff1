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
from collections.abc import Callable, Collection, Sequence
from heapq import heappop, heappush

from p2pllm_peers.lab.network import frames
from p2pllm_peers.lab.network.frames import DESTINATION, PLAIN, packets

QUEUE_S = 0.2
"""What a router holds before a line; a slow home router holds more, a good one less."""

FLOW_IDLE_S = 300.0
"""A NAT forgets a flow that was silent for so long; TCP between peers says something more often."""

HELD_LIMIT = 1 << 29
"""Bytes held in all. Queues are bounded by their lines; this bounds what is in flight on fast and long ones."""

EARLY_S = 100e-6
"""What is due so soon is handed over at once: on average that makes up for the box's rest after each turn."""

_LEAST_MS = 0.05
LATE_BOUNDS_MS = [_LEAST_MS * 1.25**step for step in range(60)]
"""Upper bounds of the classes in which latenesses are counted: 0.05 ms to 26 s, each a quarter wider."""


class Line:
    """One peer's line: its parameters, when it is free again in each direction, and what crossed it."""

    __slots__ = (
        "delay_s", "down_free", "down_s_per_byte", "flows", "jitter_s", "loss", "nat", "number", "paths", "received",
        "sent", "up_free", "up_s_per_byte",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.up_s_per_byte = self.down_s_per_byte = self.delay_s = self.jitter_s = self.loss = 0.0
        self.nat = False
        self.up_free = self.down_free = 0.0
        self.sent = self.received = 0
        self.paths: dict[bytes, Path] = {}  # by the receiver's address
        self.flows: dict[frames.Flow, float] = {}  # begun by this peer: when their last packets passed

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
    """From one peer to another: what follows from both their lines, and when the last frame arrives."""

    __slots__ = ("blocked", "delay_s", "jitters", "last", "loss", "other")

    def __init__(self, other: Line) -> None:
        self.other = other
        self.delay_s = self.loss = self.last = 0.0
        self.jitters: tuple[float, ...] = ()
        self.blocked = False

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
            line.paths = {addresses[other.number]: Path(other) for other in self.lines}
        self.frames = self.dropped = 0
        self.late_counts = [0] * (len(LATE_BOUNDS_MS) + 1)
        self.late_max_ms = 0.0
        self._addresses = addresses
        self._send = send
        self._clock = clock
        self._random = random.Random(seed).random  # noqa: S311 - losses, not secrets
        # when, number, receiver, frame, packets, bytes, how much earlier the first packet comes; -1: both lines crossed
        self._held: list[tuple[float, int, Line, bytes, int, int, float]] = []
        self._held_bytes = 0
        self._number = 0

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
        if not path.loss:
            self._leave(now, line, path, frame, count, size)
            return
        for piece in self._survivors(frame, count, path.loss):
            self._leave(now, line, path, piece, *packets(piece))

    def deliver(self) -> float | None:
        """Hand over everything that is due; returns the seconds until the next frame is, None if none is held."""
        held = self._held
        while held:
            now = self._clock()
            due = held[0][0]
            if due > now + EARLY_S:
                return due - EARLY_S - now
            _, _, line, frame, count, size, lag = heappop(held)
            if lag >= 0:
                self._enter(due, line, frame, count, size, lag)
                continue
            self._send(line.number, frame)
            line.received += size
            self.frames += 1
            self._held_bytes -= size
            late_ms = (now - due) * 1e3
            if late_ms < _LEAST_MS:
                self.late_counts[0] += 1
                continue
            self.late_counts[bisect_left(LATE_BOUNDS_MS, late_ms)] += 1
            if late_ms > self.late_max_ms:
                self.late_max_ms = late_ms
        return None

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
        self._number += 1
        self._held_bytes += size
        heappush(self._held, (arrival, self._number, path.other, frame, count, size, whole - whole / count))

    def _enter(self, due: float, line: Line, frame: bytes, count: int, size: int, lag: float) -> None:
        """A frame reaches the receiver's line. Its packets came one after the other: the first of a super-segment may
        have gone on before the last one was here."""
        if (line.nat and not line.passes_nat(frame, due)) or line.down_free - due > QUEUE_S:
            self.dropped += count
            self._held_bytes -= size
            return
        whole = size * line.down_s_per_byte
        start = due - lag
        if line.down_free > start:
            start = line.down_free
        line.down_free = done = max(start + whole, due + whole / count)
        self._number += 1
        heappush(self._held, (done, self._number, line, frame, count, size, -1.0))

    def _survivors(self, frame: bytes, count: int, loss: float) -> list[bytes]:
        lost = {index for index in range(count) if self._random() < loss}
        self.dropped += len(lost)
        return frames.without(frame, lost) if lost else [frame]
