"""Lookback: how a machine looks from outside, told by a peer: the peer's clock, our address as it sees it, and whether
our ports take connections from there.

p2pd cannot be asked to dial a peer that it is connected with, so the peer opens a plain TCP connection to a port and
waits for the greeting that any libp2p listener gives. It dials the address that the caller's own, authenticated
connection comes from and no other, a few ports a call, so that nobody can have strangers scanned. What does not live
here: what follows from the answers (the programs).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from p2pllm.errors import NetworkError
from p2pllm.network.addresses import host_of
from p2pllm.network.messages import pack, unpack
from p2pllm.network.transport import Transport

LOOKBACK, SINK = "lookback", "sink"

MAX_PORTS = 4
"""Ports that one call may name."""

DIAL_S = 4.0
"""How long a connection and its greeting may take."""

EVERY_S = 5.0
"""A peer dials one host at most once in this time, and MAX_DIALS hosts in it."""

MAX_DIALS = 8

SINK_BYTES, SINK_S = 8 << 20, 15.0
"""Most bytes and seconds of one measurement of a line; MAX_SINKS at the same time."""

MAX_SINKS = 2

WINDOW_S, PEER_BYTES, ALL_BYTES = 60.0, 2 * SINK_BYTES, 8 * SINK_BYTES
"""Most bytes that measurements bring within any such span, of one peer and of all, so that nobody fills our line."""

_VERSION = 1
_PIECE = 1 << 15
_MAX_BYTES = 512
_MAX_TIME_S = 1e12
_GREETING = b"\x13/multistream/1.0.0\n"


class Watcher(Transport, Protocol):
    """A Transport that knows where callers come from."""

    async def seen_at(self, peer: str) -> list[str]:
        """Multiaddresses from which a connected peer is connected with us."""
        ...


@dataclass(frozen=True)
class Seen:
    """What a peer says of us.

    skew_s: its clock less ours, in seconds, wrong by round_trip_s / 2 at most. host: the IP address that we come from,
    "" if it sees none, as through a relay. took: by port, whether it took a connection from there.
    """

    peer: str
    skew_s: float
    round_trip_s: float
    host: str
    took: dict[int, bool] = field(default_factory=dict)


class Allowance:
    """How many bytes peers may still send us to measure their lines."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds, never going back."""
        self._clock = clock
        self._taken = deque[tuple[float, str, int]]()  # when, by whom, bytes; not more than ALL_BYTES in all
        self._of = Counter[str]()
        self._all = 0

    def take(self, peer: str, size: int) -> bool:
        """Whether the peer may send so many bytes more; they count then, whether they come or not."""
        now = self._clock()
        while self._taken and now - self._taken[0][0] >= WINDOW_S:
            _, other, freed = self._taken.popleft()
            self._all -= freed
            self._of[other] -= freed
            if not self._of[other]:
                del self._of[other]
        if self._of[peer] + size > PEER_BYTES or self._all + size > ALL_BYTES:
            return False
        self._taken.append((now, peer, size))
        self._of[peer] += size
        self._all += size
        return True


class Lookback:
    """The answering side; every member of a run has one."""

    def __init__(
        self,
        transport: Watcher,
        *,
        dial: Callable[[str, int], Awaitable[bool]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """dial: whether a libp2p listener greets at (host, port); for tests."""
        self._transport = transport
        self._dial = dial or greets
        self._clock = clock
        self._dialled: dict[str, float] = {}  # when, by host
        self._sinks = 0
        self._allowance = Allowance(clock)

    async def start(self) -> None:
        """Answer from now on."""
        await self._transport.serve_call(LOOKBACK, self._answer)
        await self._transport.serve_stream(SINK, self._swallow)

    async def _answer(self, peer: str, payload: bytes) -> bytes:
        try:
            ports = _ports(unpack(payload, _MAX_BYTES))
        except ValueError:
            raise NetworkError("malformed question") from None
        hosts = [host for host in map(host_of, await self._transport.seen_at(peer)) if host]
        host = hosts[0] if hosts else ""
        took = []
        if host and ports and self._may_dial(host):
            answers = await asyncio.gather(*(self._dial(host, port) for port in ports))
            took = [[port, answer] for port, answer in zip(ports, answers, strict=True)]
        return pack([_VERSION, time.time(), host, took])

    def _may_dial(self, host: str) -> bool:
        now = self._clock()
        self._dialled = {other: at for other, at in self._dialled.items() if now - at < EVERY_S}
        if host in self._dialled or len(self._dialled) >= MAX_DIALS:
            return False
        self._dialled[host] = now
        return True

    async def _swallow(self, peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        """Take bytes whose sender measures its line with them; one byte back for each piece."""
        if self._sinks >= MAX_SINKS:
            return
        self._sinks += 1
        try:
            async with asyncio.timeout(SINK_S):
                for _ in range(SINK_BYTES // _PIECE):
                    if not self._allowance.take(peer, _PIECE):
                        return
                    await reader.readexactly(_PIECE)
                    writer.write(b".")
                    await writer.drain()
        except (OSError, EOFError, TimeoutError):
            return  # it has measured enough
        finally:
            self._sinks -= 1


async def look_back(transport: Transport, peer: str, ports: Sequence[int], timeout: float) -> Seen:
    """Ask a peer how we look from there. ports: at most 4, where we listen.

    Raises NetworkError if it does not answer, or runs a version that cannot be asked.
    """
    begun = time.time()
    skew, host, _ = await _asked(transport, peer, [], timeout)
    trip = time.time() - begun
    skew -= begun + trip / 2
    took = (await _asked(transport, peer, list(ports)[:MAX_PORTS], timeout + DIAL_S))[2] if ports and host else {}
    return Seen(peer, skew, trip, host, took)


async def upload_mbit(transport: Transport, peer: str, seconds: float) -> float:
    """Send a peer bytes for about so many seconds; million bits a second that arrived there.

    A line that is measured for a moment is faster than it looks: connections begin slowly. Raises NetworkError if no
    byte arrived.
    """
    reader, writer = await transport.open_stream(peer, SINK)
    begun = time.monotonic()
    sending = asyncio.create_task(_pour(writer))
    arrived, ended = 0, begun
    try:
        async with asyncio.timeout(seconds):
            while got := await reader.read(64):
                arrived, ended = arrived + len(got) * _PIECE, time.monotonic()
    except (OSError, TimeoutError):
        pass  # what arrived until then counts
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.transport.abort()
    if not arrived:
        raise NetworkError(f"Peer {peer[-8:]} took no bytes within {seconds:g} s.")
    return arrived * 8 / 1e6 / max(ended - begun, 1e-6)


async def _pour(writer: StreamWriter) -> None:
    for _ in range(SINK_BYTES // _PIECE):
        writer.write(bytes(_PIECE))
        await writer.drain()


async def greets(host: str, port: int) -> bool:
    """Whether something at (host, port) takes a TCP connection and greets as libp2p does, within DIAL_S seconds."""
    writer = None
    try:
        async with asyncio.timeout(DIAL_S):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(_GREETING)
            await writer.drain()
            return await reader.readexactly(len(_GREETING)) == _GREETING
    except (OSError, EOFError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.transport.abort()


async def _asked(
    transport: Transport, peer: str, ports: list[int], timeout: float
) -> tuple[float, str, dict[int, bool]]:
    """(the peer's Unix time, our host, what our ports took)."""
    reply = await transport.call(peer, LOOKBACK, pack([_VERSION, ports]), timeout)
    with contextlib.suppress(ValueError, TypeError):
        version, now, host, took = unpack(reply, _MAX_BYTES)
        is_time = isinstance(now, float) and 0 <= now < _MAX_TIME_S  # and not NaN
        if version == _VERSION and is_time and str.isprintable(host) and len(took) <= MAX_PORTS:
            return now, host, {port: bool(answer) for port, answer in took if port in ports}
    raise NetworkError(f"Peer {peer[-8:]} sent something that is no answer to how we look from there.")


def _ports(question: object) -> list[int]:
    """The ports of a stranger's question. Raises ValueError."""
    if not isinstance(question, list) or len(question) != 2 or question[0] != _VERSION:
        raise ValueError("not a question of this version")
    ports = question[1]
    if not isinstance(ports, list) or len(ports) > MAX_PORTS:
        raise ValueError("not a list of a few ports")
    if not all(type(port) is int and 0 < port < 65536 for port in ports):
        raise ValueError("not a port")
    return list(dict.fromkeys(ports))
