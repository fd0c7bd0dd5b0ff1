"""Gathering: everybody gets everybody's bytes, from whoever has them, or knows who is to blame."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from p2pllm.averaging import gather
from p2pllm.averaging.form import SparseForm
from p2pllm.averaging.gather import STREAM_METHOD, Gather, Gathered
from p2pllm.averaging.group import Group
from p2pllm.averaging.sparse_exchange import SparseExchange
from p2pllm.network.streams import Traffic, UnixServer, count, open_unix
from p2pllm.state import Layout
from p2pllm.testing import MemoryNetwork, virtual
from p2pllm.testing.host import MemoryHost

MAX_BYTES = 200_000


def updates(count: int, size: int = 5000) -> list[bytes]:
    return [bytes([number]) * (size + number) for number in range(count)]


def group_of(hosts: list[MemoryHost], payloads: list[bytes], number: int = 1) -> Group:
    return Group(
        group_id=bytes([number]) * 32,
        members=tuple(host.peer_id for host in hosts),
        weights=(1.0,) * len(hosts),
        size=1,
        digests=tuple(blake3(payload).digest() for payload in payloads),
    )


async def gathers(network: MemoryNetwork, count: int) -> tuple[list[MemoryHost], list[Gather]]:
    hosts = [network.host(number) for number in range(count)]
    made = [Gather(host, MAX_BYTES) for host in hosts]
    for each in made:
        await each.start()
    return hosts, made


async def exchange(
    made: list[Gather], group: Group, payloads: list[bytes], who: range | None = None, deadline: float = 60.0
) -> list[Gathered]:
    numbers = who if who is not None else range(len(made))
    return await asyncio.gather(*(made[number].run(group, payloads[number], deadline) for number in numbers))


@pytest.mark.parametrize("count", [1, 2, 5])
@virtual
async def test_all_get_all(count: int) -> None:
    hosts, made = await gathers(MemoryNetwork(latency_s=0.05), count)
    payloads = updates(count)
    for result in await exchange(made, group_of(hosts, payloads), payloads):
        assert result.updates == payloads
        assert not result.failed and not result.reason
        assert result.bytes_received == sum(map(len, payloads)) - len(payloads[0]) or count > 1
        assert result.bytes_sent >= (count - 1) * len(payloads[0])


@virtual
async def test_a_slower_member_is_waited_for() -> None:
    hosts, made = await gathers(MemoryNetwork(), 2)
    payloads = updates(2)
    group = group_of(hosts, payloads)
    first = asyncio.create_task(made[0].run(group, payloads[0], 60.0))
    await asyncio.sleep(3.0)
    assert (await made[1].run(group, payloads[1], 60.0)).updates == payloads
    assert (await first).updates == payloads


@virtual
async def test_an_update_comes_from_another_one_if_its_maker_is_cut_off() -> None:
    network = MemoryNetwork()
    hosts, made = await gathers(network, 3)
    payloads = updates(3)
    network.cut(hosts[0].peer_id, hosts[2].peer_id)
    results = await exchange(made, group_of(hosts, payloads), payloads)
    assert [result.updates for result in results] == [payloads] * 3, "member 1 passes on what both lack"


@virtual
async def test_who_is_gone_is_named() -> None:
    network = MemoryNetwork()
    hosts, made = await gathers(network, 3)
    payloads = updates(3)
    hosts[2].kill()
    for result in await exchange(made, group_of(hosts, payloads), payloads, range(2)):
        assert result.updates == [] and result.failed == {hosts[2].peer_id}
        assert hosts[2].peer_id in result.reason


@virtual
async def test_who_is_frozen_is_named_within_the_stall_time_out() -> None:
    network = MemoryNetwork()
    hosts, made = await gathers(network, 3)
    payloads = updates(3)
    hosts[2].freeze()
    begin = asyncio.get_running_loop().time()
    for result in await exchange(made, group_of(hosts, payloads), payloads, range(2)):
        assert result.failed == {hosts[2].peer_id}
    assert asyncio.get_running_loop().time() - begin < 5.5


@virtual
async def test_who_gives_something_else_than_it_signed_is_named() -> None:
    hosts, made = await gathers(MemoryNetwork(), 3)
    payloads = updates(3)
    group = group_of(hosts, payloads)

    async def lie(caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readexactly(64)
        writer.write(len(payloads[2]).to_bytes(4, "big") + bytes(len(payloads[2])))
        await writer.drain()

    await hosts[2].serve_stream(STREAM_METHOD, lie)
    for result in await exchange(made, group, payloads, range(2)):
        assert result.updates == [] and result.failed == {hosts[2].peer_id}
        assert "another update than it signed" in result.reason


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 0xFFFFFFFE])
@virtual
async def test_nobody_makes_us_take_more_than_an_update(length: int) -> None:
    hosts, made = await gathers(MemoryNetwork(), 2)
    payloads = updates(2)

    async def flood(caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readexactly(64)
        writer.write(length.to_bytes(4, "big") + bytes(1000))
        await writer.drain()

    await hosts[1].serve_stream(STREAM_METHOD, flood)
    (result,) = await exchange(made, group_of(hosts, payloads), payloads, range(1))
    assert result.failed == {hosts[1].peer_id} and str(length) in result.reason
    assert result.bytes_received == 0


@virtual
async def test_a_deadline_ends_it() -> None:
    hosts, made = await gathers(MemoryNetwork(latency_s=1.0), 2)
    payloads = updates(2)
    begin = asyncio.get_running_loop().time()
    for result in await exchange(made, group_of(hosts, payloads), payloads, deadline=0.5):
        assert result.updates == [] and len(result.failed) == 1 and "in time" in result.reason
    assert asyncio.get_running_loop().time() - begin == 0.5


@virtual
async def test_strangers_get_nothing() -> None:
    network = MemoryNetwork()
    hosts, made = await gathers(network, 3)
    payloads = updates(2)
    group = group_of(hosts[:2], payloads)
    await exchange(made, group, payloads, range(2))
    reader, writer = await hosts[2].open_stream(hosts[0].peer_id, STREAM_METHOD)
    writer.write(group.group_id + group.digests[0])
    assert await reader.readexactly(4) == b"\xff" * 4
    writer.close()


@virtual
async def test_a_group_must_name_our_update_and_is_run_once() -> None:
    hosts, made = await gathers(MemoryNetwork(), 2)
    payloads = updates(2)
    group = group_of(hosts, payloads)
    with pytest.raises(ValueError, match="another update than ours"):
        await made[0].run(group, payloads[1], 1.0)
    await exchange(made, group, payloads)
    with pytest.raises(ValueError, match="run before"):
        await made[0].run(group, payloads[0], 1.0)


@virtual
async def test_what_arrived_is_told_and_all_who_failed_are_named() -> None:
    hosts, made = await gathers(MemoryNetwork(), 4)
    payloads = updates(4)
    hosts[2].kill()

    async def refuse(caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readexactly(64)
        writer.write(b"\xff" * 4)

    await hosts[3].serve_stream(STREAM_METHOD, refuse)
    for result in await exchange(made, group_of(hosts, payloads), payloads, range(2)):
        assert result.arrived == {hosts[number].peer_id: payloads[number] for number in range(2)}
        assert result.failed == {hosts[2].peer_id, hosts[3].peer_id}
        first, second = result.reason.split("; ")
        assert hosts[2].peer_id in first and hosts[3].peer_id in second


@virtual
async def test_an_update_that_is_none_is_found_while_another_one_is_missing() -> None:
    network = MemoryNetwork()
    hosts, made = await gathers(network, 3)
    form = SparseForm(Layout.of([("weight", (4, 32))]))
    ours = SparseExchange(hosts[0], form, "5a" * 32, error_decay=0.95)
    await ours.start()
    payload = ours.pack(np.ones(128, np.float32))
    assert isinstance(payload, bytes)
    payloads = [payload, b"nonsense", b"missing"]
    hosts[2].kill()
    group = group_of(hosts, payloads)
    result, _ = await asyncio.gather(ours.run(group, payload, 60.0), made[1].run(group, payloads[1], 60.0))
    assert result.aggregate is None and result.failed == {hosts[1].peer_id, hosts[2].peer_id}
    assert all(host.peer_id in result.reason for host in hosts[1:])


@virtual
async def test_nothing_more_is_taken_of_who_asks_before_we_begin() -> None:
    hosts, _ = await gathers(MemoryNetwork(), 2)
    answering = hosts[0].streams[STREAM_METHOD]
    ends: list[StreamWriter] = []

    async def tap(caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        ends.append(writer)
        await answering(caller, reader, writer)

    await hosts[0].serve_stream(STREAM_METHOD, tap)
    _, writer = await hosts[1].open_stream(hosts[0].peer_id, STREAM_METHOD)
    writer.write(bytes(64))
    await asyncio.sleep(1.0)
    assert not ends[0].transport.is_reading()
    writer.close()


@virtual
async def test_strangers_leave_room_for_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_MAX_OPEN_TO_OTHERS", 3)
    network = MemoryNetwork()
    hosts, made = await gathers(network, 8)
    payloads = updates(2)
    await exchange(made, group_of(hosts[:2], payloads), payloads, range(2))
    await asyncio.sleep(1.0)

    async def is_kept(host: MemoryHost) -> bool:
        reader, writer = await host.open_stream(hosts[0].peer_id, STREAM_METHOD)
        writer.write(bytes(64))
        try:
            async with asyncio.timeout(1.0):
                return bool(await reader.read(1))
        except TimeoutError:
            return True  # it waits until we begin

    assert [await is_kept(host) for host in hosts[2:7]] == [True, True, True, False, False]
    assert await is_kept(hosts[1])


@virtual
async def test_patience_is_learned_from_who_is_late() -> None:
    hosts, made = await gathers(MemoryNetwork(), 2)
    payloads = updates(2)

    async def be_late(caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readexactly(64)
        await asyncio.sleep(8.0)
        writer.write(len(payloads[1]).to_bytes(4, "big") + payloads[1])
        await writer.drain()

    await hosts[1].serve_stream(STREAM_METHOD, be_late)
    (result,) = await exchange(made, group_of(hosts, payloads), payloads, range(1))
    assert result.failed == {hosts[1].peer_id}
    await asyncio.sleep(10.0)
    (result,) = await exchange(made, group_of(hosts, payloads, 2), payloads, range(1))
    assert result.updates == payloads


class Socket:
    """A Transport to one peer, which gives its update at once; this machine limits what it receives and sends."""

    peer_id = "us"

    def __init__(self, path: Path, mbit: float) -> None:
        self.path, self.traffic = path, Traffic()
        self.traffic.intake.mbit = self.traffic.pacer.mbit = mbit

    async def open_stream(self, peer: str, method: str, expected: int = 0) -> tuple[StreamReader, StreamWriter]:
        reader, writer = await open_unix(self.path)
        count(reader, writer, self.traffic.of(method), 0)
        return reader, writer


async def test_nobody_is_blamed_for_how_fast_we_receive(tmp_path: Path) -> None:
    payloads = [b"ours", bytes(400_000)]

    async def give(reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readexactly(64)
        writer.write(len(payloads[1]).to_bytes(4, "big") + payloads[1])
        await writer.drain()
        await reader.read()

    server = UnixServer(tmp_path / "socket", give)
    await server.start()
    made = Gather(Socket(tmp_path / "socket", 2.0), 1 << 20, stall_timeout=0.25)  # type: ignore[arg-type]
    digests = tuple(blake3(payload).digest() for payload in payloads)
    result = await made.run(Group(bytes(32), ("us", "them"), (1.0, 1.0), 1, digests=digests), payloads[0], 30.0)
    assert result.reason == "" and result.updates == payloads
    await server.close()


async def test_all_who_ask_a_slow_machine_get_something_in_a_moment(tmp_path: Path) -> None:
    server = UnixServer(tmp_path / "socket", lambda reader, writer: reader.read())
    await server.start()
    transport = Socket(tmp_path / "socket", 1.0)
    _, writer = await transport.open_stream("them", STREAM_METHOD)
    made = Gather(transport, 1 << 20)  # type: ignore[arg-type]
    made._open = Counter({"one": 10})
    assert 10 * made._piece_bytes(writer) * 8 <= 0.5e6
    transport.traffic.pacer.mbit = 0.0
    assert made._piece_bytes(writer) == 1 << 16
    writer.close()
    await server.close()
