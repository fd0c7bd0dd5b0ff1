"""How a machine looks from outside: what a peer tells, whom it dials, and whom not."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import pytest

from p2pllm.errors import NetworkError
from p2pllm.network.lookback import (
    ALL_BYTES,
    EVERY_S,
    LOOKBACK,
    MAX_DIALS,
    MAX_SINKS,
    PEER_BYTES,
    SINK,
    SINK_BYTES,
    SINK_S,
    WINDOW_S,
    Allowance,
    Lookback,
    greets,
    host_of,
    look_back,
    upload_mbit,
)
from p2pllm.network.messages import pack
from p2pllm.testing import MemoryHost, MemoryNetwork, virtual


class SeenHost(MemoryHost):
    """Knows where callers come from."""

    __slots__ = ("places",)

    async def seen_at(self, peer: str) -> list[str]:
        return self.places


class SeenNetwork(MemoryNetwork):
    host_class = SeenHost


class Teller:
    """A peer that answers, and what it has dialled."""

    def __init__(self, places: list[str], latency_s: float = 0.0) -> None:
        network = SeenNetwork(latency_s=latency_s)
        self.us, self.host = network.host(0), network.host(1)
        self.host.places = places
        self.dialled: list[tuple[str, int]] = []
        self.now = 0.0
        self.lookback = Lookback(self.host, dial=self.dial, clock=lambda: self.now)

    async def dial(self, host: str, port: int) -> bool:
        self.dialled.append((host, port))
        return port == 4001


HOME = "/ip4/198.51.100.7/tcp/53210"


@virtual
async def test_a_peer_dials_only_where_we_come_from() -> None:
    teller = Teller([HOME])
    await teller.lookback.start()
    seen = await look_back(teller.us, teller.host.peer_id, [4001, 4002], 5.0)
    assert seen.host == "198.51.100.7" and seen.took == {4001: True, 4002: False}
    assert teller.dialled == [("198.51.100.7", 4001), ("198.51.100.7", 4002)]


@virtual
async def test_a_host_is_dialled_seldom_and_few_hosts_at_once() -> None:
    teller = Teller([HOME])
    await teller.lookback.start()

    async def took() -> dict[int, bool]:
        return (await look_back(teller.us, teller.host.peer_id, [4001], 5.0)).took

    assert await took() == {4001: True}
    assert await took() == {}, "the same host again"
    teller.now += EVERY_S
    assert await took() == {4001: True}
    for number in range(MAX_DIALS + 3):
        teller.host.places = [f"/ip4/192.0.2.{number}/tcp/1"]
        await took()
    assert len(teller.dialled) == 2 + MAX_DIALS - 1


@pytest.mark.parametrize("places", [[], ["/ip4/192.0.2.1/tcp/1/p2p/12D3/p2p-circuit"], ["/dns4/example.org/tcp/1"]])
@virtual
async def test_who_comes_through_a_relay_is_not_dialled(places: list[str]) -> None:
    teller = Teller(places)
    await teller.lookback.start()
    seen = await look_back(teller.us, teller.host.peer_id, [4001], 5.0)
    assert seen.host == "" and seen.took == {} and teller.dialled == []


STRANGE: list[Any] = [None, [], [2, [1]], [1, [1] * 5], [1, [0]], [1, [70_000]], [1, ["80"]], [1, [True]], [1, 80]]


@pytest.mark.parametrize("question", STRANGE)
@virtual
async def test_strange_questions_are_refused(question: Any) -> None:
    teller = Teller([HOME])
    await teller.lookback.start()
    with pytest.raises(NetworkError):
        await teller.us.call(teller.host.peer_id, LOOKBACK, pack(question), 5.0)
    assert teller.dialled == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        pack([1, "now", "", []]),
        pack([1, math.nan, "", []]),
        pack([1, 1e300, "", []]),
        pack([2, 1.0, "", []]),
        pack([1, 1.0, 7, []]),
        pack([1, 1.0, "\x1b[2J", []]),
        pack([1, 1.0, "", [[1, 2]] * 9]),
    ],
)
@virtual
async def test_strange_answers_are_refused(answer: bytes) -> None:
    teller = Teller([HOME])

    async def answering(peer: str, payload: bytes) -> bytes:
        return answer

    await teller.host.serve_call(LOOKBACK, answering)
    with pytest.raises(NetworkError, match="no answer"):
        await look_back(teller.us, teller.host.peer_id, [4001], 5.0)


@virtual
async def test_an_answer_tells_of_the_ports_that_were_asked_for_alone() -> None:
    teller = Teller([HOME])

    async def answering(peer: str, payload: bytes) -> bytes:
        return pack([1, 1.0, "198.51.100.7", [[4001, True], [22, True], [math.inf, True]]])

    await teller.host.serve_call(LOOKBACK, answering)
    assert (await look_back(teller.us, teller.host.peer_id, [4001], 5.0)).took == {4001: True}


@virtual
async def test_a_clock_is_compared_with_the_middle_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    teller = Teller([HOME], latency_s=0.5)
    monkeypatch.setattr(time, "time", lambda: 1e9 + loop.time())
    await teller.lookback.start()
    seen = await look_back(teller.us, teller.host.peer_id, [], 5.0)
    assert seen.round_trip_s == pytest.approx(1.0) and seen.skew_s == pytest.approx(0.0, abs=1e-3)


@virtual
async def test_bytes_are_counted_as_they_arrive() -> None:
    teller = Teller([HOME], latency_s=0.01)
    await teller.lookback.start()
    assert await upload_mbit(teller.us, teller.host.peer_id, 5.0) > 0
    assert teller.us.written == SINK_BYTES


@virtual
async def test_few_lines_are_measured_at_once() -> None:
    teller = Teller([HOME], latency_s=0.01)
    await teller.lookback.start()
    held = [await teller.us.open_stream(teller.host.peer_id, SINK) for _ in range(MAX_SINKS)]
    await asyncio.sleep(1)  # virtual: all handlers have begun
    with pytest.raises(NetworkError, match="took no bytes"):
        await upload_mbit(teller.us, teller.host.peer_id, 0.5)
    await asyncio.sleep(SINK_S)
    assert await upload_mbit(teller.us, teller.host.peer_id, 5.0) > 0, "who sends nothing is not waited for"
    for _, writer in held:
        writer.close()


@virtual
async def test_nobody_fills_our_line_with_measurements() -> None:
    teller = Teller([HOME], latency_s=0.01)
    await teller.lookback.start()
    sender, us = teller.us, teller.host.peer_id
    for _ in range(PEER_BYTES // SINK_BYTES):
        assert await upload_mbit(sender, us, 5.0) > 0
    with pytest.raises(NetworkError, match="took no bytes"):
        await upload_mbit(sender, us, 5.0)
    teller.now += WINDOW_S - 1
    with pytest.raises(NetworkError, match="took no bytes"):
        await upload_mbit(sender, us, 5.0)
    teller.now += 1
    assert await upload_mbit(sender, us, 5.0) > 0


def test_an_allowance_is_of_each_peer_and_of_all_and_comes_back() -> None:
    now = [0.0]
    allowance = Allowance(lambda: now[0])
    piece, some = PEER_BYTES // 16, ALL_BYTES // PEER_BYTES
    for peer in range(some):
        assert sum(allowance.take(str(peer), piece) for _ in range(99)) == 16
    assert not any(allowance.take(f"another {number}", piece) for number in range(1000)), "new names help nobody"
    now[0] = WINDOW_S - 0.1
    assert not allowance.take("0", piece)
    now[0] = WINDOW_S
    assert allowance.take("0", piece) and len(allowance._of) <= 2, "nothing is remembered for longer"
    assert sum(allowance.take("0", 1 << 15) for _ in range(10_000)) * (1 << 15) <= PEER_BYTES - piece


async def test_only_what_greets_as_libp2p_does_is_taken_for_it() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(20))
        await writer.drain()
        writer.close()

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    for serve, expected in ((echo, True), (web, False)):
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            assert await greets("127.0.0.1", port) is expected
    assert not await greets("127.0.0.1", port), "it is closed"


def test_hosts_of_addresses() -> None:
    assert host_of("/ip4/192.0.2.1/tcp/1") == "192.0.2.1" and host_of("/ip6/2001:db8::1/tcp/1") == "2001:db8::1"
    assert host_of("/ip4/router/tcp/1") == "" and host_of("/dns4/router/tcp/1") == ""  # nothing is asked of DNS
    assert host_of("/ip4/192.0.2.1/tcp/1/p2p/x/p2p-circuit") == "" and host_of("") == "" and host_of("/ip4") == ""
