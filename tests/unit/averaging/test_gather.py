"""Gathering: everybody gets everybody's bytes, from whoever has them, or knows who is to blame."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter

import pytest
from blake3 import blake3

from p2pllm.averaging.gather import STREAM_METHOD, Gather, Gathered
from p2pllm.averaging.group import Group
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
    for gather in made:
        await gather.start()
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
