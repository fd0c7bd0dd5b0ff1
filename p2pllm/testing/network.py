"""A network in memory: hosts that call each other and open streams, and whatever can go wrong between them.

A `MemoryHost` is a Transport and a Dialer, so the round protocol, the all-reduce and membership run on it unchanged.
Messages take `latency_s` and up to `jitter_s` more, one way. What travels on a path that hangs, because an end is
frozen or the path is cut, arrives when it hangs no more, unless its caller has given up. Needs the virtual clock.

    network = MemoryNetwork(latency_s=0.02, jitter_s=0.005, seed=1)
    first, second = network.host(0), network.host(1)
    await second.serve_call("echo", echo)
    reply = await first.call(second.peer_id, "echo", b"hello", timeout=2.0)
    second.freeze()
    network.cut(first.peer_id, second.peer_id)
    first.sent["echo"].bytes

What does not live here: one host (`host`), the bytes of streams (`pipe`), peers (`swarm`), and scripted faults
(`faults`).
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
import itertools
import math
import random
from asyncio import StreamReader, StreamWriter
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.identity import Identity
from p2pllm.testing.clock import TICK_S
from p2pllm.testing.host import OWNER, Call, MemoryHost
from p2pllm.testing.pipe import Pipe

LATENCY_S = 0.001
"""One way, unless a network is told otherwise."""

Ends = tuple[StreamReader, StreamWriter]


@functools.lru_cache(maxsize=16384)
def identity_number(number: int) -> Identity:
    """The key of peer 0, 1, 2, ..., the same in every run."""
    return Identity(Ed25519PrivateKey.from_private_bytes((number + 1).to_bytes(32, "big")))


def peer_number(number: int) -> str:
    """The id of peer 0, 1, 2, ...."""
    return identity_number(number).peer_id


class MemoryNetwork:
    """All hosts by peer id, and what lies between them. host_class: what `host` makes; a subclass may have its own."""

    host_class: type[MemoryHost] = MemoryHost

    def __init__(
        self, latency_s: float = LATENCY_S, jitter_s: float = 0.0, seed: int = 0, *, needs_addresses: bool = False
    ) -> None:
        """latency_s, jitter_s: seconds one way, of every message. needs_addresses: a host reaches only those whose
        addresses it has learnt, and those that have called it.
        """
        self.latency_s = latency_s
        self.jitter_s = jitter_s
        self.needs_addresses = needs_addresses
        self.hosts: dict[str, MemoryHost] = {}
        self.stuck: dict[Pipe, None] = {}  # streams with bytes that hang
        self.context = contextvars.copy_context()  # what is under way belongs to no host
        self.context.run(OWNER.set, None)
        self._random = random.Random(seed)  # noqa: S311 - it shall be the same in every run
        self._latencies: dict[tuple[str, str], float] = {}
        self._cut: set[frozenset[str]] = set()
        self._agenda: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = itertools.count()
        self._armed = math.inf
        self._held: list[Call] = []
        self._room = 64  # of `_held`, before those are dropped that gave up
        self._expiring: dict[float, deque[tuple[float, Call]]] = {}  # time-out -> calls, by deadline

    def host(self, who: int | str) -> MemoryHost:
        """A new host: number 0, 1, 2, ..., or one with a peer id of the test's own.

        One that was killed is started anew and keeps its counters. Raises ValueError if it lives.
        """
        peer_id = who if isinstance(who, str) else peer_number(who)
        old = self.hosts.get(peer_id)
        if old is not None and not old.dead:
            raise ValueError(f"There is a host {peer_id} already; kill it first, or choose another number.")
        host = self.host_class(self, who if isinstance(who, int) else len(self.hosts), peer_id)
        if old is not None:
            host.sent, host.received, host.written = old.sent, old.received, old.written
        self.hosts[peer_id] = host
        return host

    def first(self, count: int) -> list[MemoryHost]:
        """The hosts that were made first, at most `count`."""
        return list(itertools.islice(self.hosts.values(), count))

    # -- paths -------------------------------------------------------------------------------------------------------

    def delay(self, sender: MemoryHost, receiver: MemoryHost) -> float:
        """Seconds that one message takes now. Override it for another model of the network."""
        delay = self.latency_s
        if self._latencies:
            delay = self._latencies.get((sender.peer_id, receiver.peer_id), delay)
        if self.jitter_s:
            delay += self._random.random() * self.jitter_s
        return delay + sender.extra_s + receiver.extra_s

    def set_latency(self, one: str, other: str, seconds: float) -> None:
        """Seconds each way between these two peers."""
        self._latencies[one, other] = self._latencies[other, one] = seconds

    def slow(self, peer: str, extra_s: float) -> None:
        """Everything from and to this peer takes so much longer; 0 for as long as before."""
        self.hosts[peer].extra_s = extra_s

    def cut(self, one: str, other: str | None = None) -> None:
        """Nothing passes between these two, or between `one` and everybody; no connection breaks."""
        if other is None:
            self.hosts[one].cut_off = True
        else:
            self._cut.add(frozenset((one, other)))

    def mend(self, one: str, other: str | None = None) -> None:
        """The opposite of the same `cut`."""
        if other is None:
            self.hosts[one].cut_off = False
        else:
            self._cut.discard(frozenset((one, other)))
        self.retry()

    def partition(self, *groups: Iterable[str]) -> None:
        """Only peers of one group reach each other; those that are in none are one more group."""
        for host in self.hosts.values():
            host.side = 0
        for side, group in enumerate(groups, 1):
            for peer in group:
                self.hosts[peer].side = side
        self.retry()

    def heal(self) -> None:
        """No cut and no partition any more."""
        self._cut.clear()
        for host in self.hosts.values():
            host.cut_off, host.side = False, 0
        self.retry()

    def hangs(self, one: MemoryHost, other: MemoryHost) -> bool:
        """Nothing passes between these two now."""
        if one.frozen or other.frozen or one.cut_off or other.cut_off or one.side != other.side:
            return True
        return bool(self._cut) and frozenset((one.peer_id, other.peer_id)) in self._cut

    def retry(self) -> None:
        """Faults have changed: what hung goes on where it can."""
        held, self._held = self._held, []
        for call in held:
            (self._return if call.answered else self._arrive)(call)
        stuck, self.stuck = self.stuck, {}
        for pipe in stuck:
            pipe.deliver()

    # -- what is under way -------------------------------------------------------------------------------------------

    def later(self, due: float, act: Callable[[Any], None], argument: Any) -> None:
        """Do something at a time; what is for the same time is done in the order in which it came."""
        # One timer for all that is under way: the loop's own queue is slow when it is long.
        heapq.heappush(self._agenda, (due, next(self._order), act, argument))
        self._arm()

    def _arm(self) -> None:
        if self._agenda and self._agenda[0][0] < self._armed:
            self._armed = self._agenda[0][0]
            asyncio.get_running_loop().call_at(self._armed, self._go_on, context=self.context)

    def _go_on(self) -> None:
        now = asyncio.get_running_loop().time() + TICK_S
        while self._agenda and self._agenda[0][0] <= now:
            _, _, act, argument = heapq.heappop(self._agenda)
            act(argument)
        if self._armed <= now:
            self._armed = math.inf
        self._arm()

    # -- calls -----------------------------------------------------------------------------------------------

    def send(self, call: Call, timeout: float) -> None:
        """Put a call on its way; its future is done within `timeout` seconds. Raises UnreachableError."""
        caller = call.caller
        if caller.dead:
            raise caller.lost()
        if self.needs_addresses and call.peer not in caller.known:
            raise UnreachableError(f"Peer {call.peer[-8:]} cannot be reached: no address is known.")
        caller.gave(call.method, len(call.payload), 1)
        callee = call.callee = self.hosts.get(call.peer)
        delay = self.latency_s if callee is None else self.delay(caller, callee)
        loop = asyncio.get_running_loop()
        now = loop.time()
        self.later(now + delay, self._arrive, call)
        # One queue for each time-out, in which deadlines only rise, so that a call needs no timer of its own.
        queue = self._expiring.get(timeout)
        if queue is None:
            queue = self._expiring[timeout] = deque()
            loop.call_at(now + timeout, self._expire, timeout, context=self.context)
        queue.append((now + timeout, call))

    def _arrive(self, call: Call) -> None:
        if call.done:
            return
        callee = call.callee = self.hosts.get(call.peer)
        if callee is None or callee.dead:
            self._fail(call, UnreachableError(f"Peer {call.peer[-8:]} cannot be reached: connection refused."))
        elif self.hangs(call.caller, callee):
            self._hold(call)
        else:
            if self.needs_addresses:
                callee.known.add(call.caller.peer_id)
            callee.take(call)

    def reply(self, call: Call) -> None:
        """The callee has answered."""
        callee, caller = call.callee, call.caller
        if callee is None or call.done:
            return
        call.answered = True
        if call.is_stream:  # it may be written to at once
            self._return(call)
        else:
            callee.gave(call.method, 0 if call.error else len(call.answer), 1)
            due = asyncio.get_running_loop().time() + self.delay(callee, caller)
            self.later(due, self._return, call)

    def _return(self, call: Call) -> None:
        if call.done:
            return
        callee, caller = call.callee, call.caller
        if caller.dead:
            call.end(caller.lost())
        elif caller.frozen or (callee is not None and self.hangs(callee, caller)):
            self._hold(call)
        elif call.error is not None:
            call.end(call.error)
        else:
            if not call.is_stream:
                caller.got(call.method, len(call.answer), 1)
            call.end(None, call.answer)

    def _fail(self, call: Call, error: NetworkError) -> None:
        """The caller learns it without anything having to reach it."""
        call.error, call.answered, call.callee = error, True, None
        self._return(call)

    def _hold(self, call: Call) -> None:
        self._held.append(call)
        if len(self._held) > self._room:
            self._held = [held for held in self._held if not held.done]
            self._room = max(64, 2 * len(self._held))

    def _expire(self, timeout: float) -> None:
        loop, queue = asyncio.get_running_loop(), self._expiring[timeout]
        now = loop.time() + TICK_S
        while queue and (queue[0][0] <= now or queue[0][1].done):
            call = queue.popleft()[1]
            if not call.done and not (call.answered and call.caller.frozen):
                name = call.peer[-8:]
                self._fail(call, NetworkError(f"Peer {name} did not answer {call.method} within {timeout:g} s."))
        if queue:
            loop.call_at(queue[0][0], self._expire, timeout, context=self.context)
        else:
            del self._expiring[timeout]

    # -- streams -----------------------------------------------------------------------------------------------------

    async def pipe(self, caller: MemoryHost, callee: MemoryHost, method: str) -> tuple[Ends, Ends]:
        """The caller's and the callee's end of a new stream. Override it for streams of another kind."""
        ours, theirs = Pipe(caller, method), Pipe(callee, method)
        ours.other, theirs.other = theirs, ours
        return (ours.reader, ours.writer()), (theirs.reader, theirs.writer())
