"""When each frame passes the middle of the network: rates, delays, jitter, losses, cuts and NAT of all lines.

Pure but for a seeded random generator: times come in, frames go out through a callable. A frame from one peer to
another crosses, in this order: the sender's line at its rate; loss; the delays of both lines, with their jitter, in
which it never overtakes another frame of its pair; the receiver's NAT; the receiver's line at its rate. Before each
rate waits at most `QUEUE_S` of traffic; what comes on top is dropped from the tail, as in a router.

All times in seconds on one clock, sizes in bytes on the wire. What does not live here: devices (`box`), the bytes of
frames (`frames`).
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from p2pllm_peers.lab import frames

QUEUE_S = 0.2
"""What a router holds before a line; a slow home router holds more, a good one less."""

FLOW_IDLE_S = 300.0
"""A NAT forgets a flow that was silent for so long; TCP between peers says something more often."""

HELD_LIMIT = 1 << 29
"""Bytes held in all. Queues are bounded by their lines; this bounds what is in flight on fast and long ones."""

EARLY_S = 50e-6
"""What is due so soon is handed over at once: to sleep for it costs more than it is worth."""

LATE_BOUNDS_MS = [0.05 * 1.25**step for step in range(60)]
"""Upper bounds of the classes in which latenesses are counted: 0.05 ms to 26 s, each a quarter wider."""


class Line:
    """One peer's line: its parameters, when it is free again in each direction, and what crossed it."""

    __slots__ = (
        "delay_s", "down_free", "down_s_per_byte", "flows", "jitter_s", "loss", "nat", "received", "sent",
        "up_free", "up_s_per_byte",
    )  # fmt: skip

    def __init__(self) -> None:
        self.up_s_per_byte = self.down_s_per_byte = self.delay_s = self.jitter_s = self.loss = 0.0
        self.nat = False
        self.up_free = self.down_free = 0.0
        self.sent = self.received = 0
        self.flows: dict[frames.Flow, float] = {}  # begun by this peer: when its last packet passed

    def set(self, up_mbit: float, down_mbit: float, delay_ms: float, jitter_ms: float, loss: float, nat: bool) -> None:
        """Change the parameters; a rate of 0 is no limit. Frames that wait already keep their times."""
        self.up_s_per_byte = 8e-6 / up_mbit if up_mbit else 0.0
        self.down_s_per_byte = 8e-6 / down_mbit if down_mbit else 0.0
        self.delay_s, self.jitter_s = delay_ms / 1e3, jitter_ms / 1e3
        self.loss, self.nat = loss, nat

    def passes_nat(self, frame: bytes, now: float) -> bool:
        """An incoming frame belongs to a flow that this peer began and that is not forgotten yet."""
        flow = frames.incoming(frame)
        if flow is None or self.flows.get(flow, -FLOW_IDLE_S) <= now - FLOW_IDLE_S:
            return False
        self.flows[flow] = now
        return True

    def note_flow(self, frame: bytes, now: float) -> None:
        """The peer sent this: what answers it may pass. Forgotten flows are dropped when there are many."""
        if (flow := frames.outgoing(frame)) is not None:
            self.flows[flow] = now
            if len(self.flows) > 4096:
                self.flows = {key: last for key, last in self.flows.items() if last > now - FLOW_IDLE_S}


class Lines:
    """All lines and the frames on them. `send(peer, frame)` hands a frame over to the peer of that index."""

    def __init__(
        self,
        addresses: Iterable[bytes],
        send: Callable[[int, bytes], None],
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """addresses: the IPv4 address of each peer, 4 bytes, in the order of their indexes."""
        self._index = {address: index for index, address in enumerate(addresses)}
        self.lines = [Line() for _ in self._index]
        self.blocked: set[tuple[int, int]] = set()
        self.frames = self.bytes = self.dropped = 0
        self.late_counts = [0] * (len(LATE_BOUNDS_MS) + 1)
        self.late_max_ms = 0.0
        self._send = send
        self._clock = clock
        self._random = random.Random(seed).random  # noqa: S311 - losses, not secrets
        self._last: dict[tuple[int, int], float] = {}  # when the last frame of a pair arrives
        # when, number, receiver, frame, packets, bytes, how much earlier the first packet comes; -1: both lines crossed
        self._held: list[tuple[float, int, int, bytes, int, int, float]] = []
        self._held_bytes = 0
        self._number = 0

    def take(self, source: int, frame: bytes) -> None:
        """A frame that `source` sends now."""
        now = self._clock()
        line = self.lines[source]
        count, size = frames.packets(frame)
        start = line.up_free if line.up_free > now else now
        if start - now > QUEUE_S or self._held_bytes > HELD_LIMIT:
            self.dropped += count
            return
        line.up_free = done = start + size * line.up_s_per_byte
        line.sent += size
        if line.nat:
            line.note_flow(frame, now)
        target = self._index.get(frame[frames.DESTINATION])
        if target is None or (source, target) in self.blocked:
            return
        other = self.lines[target]
        arrival = done + line.delay_s + other.delay_s
        if line.jitter_s or other.jitter_s:
            arrival += self._random() * line.jitter_s + self._random() * other.jitter_s
        last = self._last.get((source, target), 0.0)
        if arrival < last:
            arrival = last
        self._last[source, target] = arrival
        lag = size * line.up_s_per_byte * (1 - 1 / count)
        if line.loss or other.loss:
            for piece in self._survivors(frame, count, line.loss + other.loss - line.loss * other.loss):
                self._hold(arrival, target, piece, *frames.packets(piece), lag)
        else:
            self._hold(arrival, target, frame, count, size, lag)

    def deliver(self) -> float | None:
        """Hand over everything that is due; returns the seconds until the next frame is, None if none is held."""
        held = self._held
        while held:
            now = self._clock()
            due = held[0][0]
            if due > now + EARLY_S:
                return due - EARLY_S - now
            _, _, target, frame, count, size, lag = heappop(held)
            self._held_bytes -= size
            if lag >= 0:
                self._enter(due, target, frame, count, size, lag)
                continue
            self._send(target, frame)
            self.lines[target].received += size
            self.frames += 1
            self.bytes += size
            late_ms = (now - due) * 1e3
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

    def _enter(self, due: float, target: int, frame: bytes, count: int, size: int, lag: float) -> None:
        """A frame reaches the receiver's line. Its packets came one after the other: the first of a super-segment may
        have gone on before the last one was here."""
        line = self.lines[target]
        if (line.nat and not line.passes_nat(frame, due)) or line.down_free - due > QUEUE_S:
            self.dropped += count
            return
        whole = size * line.down_s_per_byte
        start = due - lag
        if line.down_free > start:
            start = line.down_free
        line.down_free = done = max(start + whole, due + whole / count)
        self._hold(done, target, frame, count, size, -1.0)

    def _hold(self, due: float, target: int, frame: bytes, count: int, size: int, lag: float) -> None:
        self._number += 1
        self._held_bytes += size
        heappush(self._held, (due, self._number, target, frame, count, size, lag))

    def _survivors(self, frame: bytes, count: int, loss: float) -> list[bytes]:
        lost = {index for index in range(count) if self._random() < loss}
        self.dropped += len(lost)
        return frames.without(frame, lost) if lost else [frame]
