"""The parts of a simulated peer."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from p2pllm.averaging import ExchangeResult, Group
from p2pllm.network import dht
from p2pllm.testing.host import Count
from p2pllm_peers.lab.simulation import parts as simulator_parts
from p2pllm_peers.lab.simulation.exchange import FewFloats
from p2pllm_peers.lab.simulation.ledger import Traffic, islands
from p2pllm_peers.lab.simulation.parts import CoarseLoop, MemoryDirectory, PathNetwork


def run(work: Any) -> Any:
    with asyncio.Runner(loop_factory=CoarseLoop) as runner:
        return runner.run(work)


def test_the_directory_is_as_large_as_the_real_one() -> None:
    assert simulator_parts.MAX_RECORDS == dht.MAX_RECORDS
    assert (simulator_parts.RECORD_S, simulator_parts.ANNOUNCE_S) == (dht.RECORD_SECONDS, dht.ANNOUNCE_SECONDS)


def test_the_directory_refuses_more_until_records_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_parts, "MAX_RECORDS", 2)
    directory = MemoryDirectory()
    for number, peer in enumerate("abc"):
        directory.announce(peer, ["/ip4/1.2.3.4"], float(number))
    assert [entry.peer for entry in directory.entries(2.0)] == ["a", "b"]
    directory.announce("c", [], 60.5)
    assert [entry.peer for entry in directory.entries(60.5)] == ["b", "c"]


async def _delays() -> None:
    network = PathNetwork(0.02, 0.08, seed=1)
    hosts = [network.host(number) for number in range(40)]
    delays = [network.delay(a, b) for a in hosts for b in hosts if a is not b]
    assert 0.02 <= min(delays) < 0.025 and 0.075 < max(delays) <= 0.08
    assert abs(sum(delays) / len(delays) - 0.05) < 0.003
    assert network.delay(hosts[1], hosts[2]) == network.delay(hosts[1], hosts[2])
    assert network.delay(hosts[1], hosts[2]) != PathNetwork(0.02, 0.08, seed=2).delay(hosts[1], hosts[2])


def test_every_path_has_a_delay_of_its_own() -> None:
    run(_delays())


async def _grid() -> list[float]:
    loop = asyncio.get_running_loop()
    begin, seen = loop.time(), []
    for seconds in (0.0101, 0.001, 0.25):
        await asyncio.sleep(seconds)
        seen.append(round(loop.time() - begin, 6))
    return seen


def test_times_are_rounded_up_to_the_grid() -> None:
    assert run(_grid()) == [0.011, 0.012, 0.262]


async def _last_moment() -> int:
    loop = asyncio.get_running_loop()
    deadline, turns = loop.time() + 0.0300000001, 0
    while (left := deadline - loop.time()) > 0 and turns < 100:
        await asyncio.sleep(left)
        turns += 1
    return turns


def test_time_passes_for_who_waits_for_next_to_nothing() -> None:
    assert run(_last_moment()) <= 2


async def _exchange(strike: str) -> tuple[list[ExchangeResult], float]:
    network = PathNetwork(0.02, 0.08, seed=1)
    hosts = [network.host(number) for number in range(4)]
    sides = [FewFloats(host, lambda group: None) for host in hosts]
    for side in sides:
        await side.start()
    group = Group(bytes(32), tuple(host.peer_id for host in hosts), (1.0, 2.0, 3.0, 4.0), 4, "fp32")
    loop = asyncio.get_running_loop()
    begin = loop.time()
    if strike == "kill":
        hosts[3].kill()
    members = [
        (host, side)
        for host, side in zip(hosts, sides, strict=True)
        if not (host.dead or (strike == "late" and host is hosts[3]))
    ]
    work = [asyncio.create_task(side.run(group, np.full(4, host.number, np.float32), 60.0)) for host, side in members]
    return list(await asyncio.gather(*work)), loop.time() - begin


def test_all_members_get_the_same_mean() -> None:
    results, seconds = run(_exchange(""))
    assert len(results) == 4 and seconds < 0.2
    for result in results:
        assert result.aggregate is not None and result.aggregate.tolist() == pytest.approx([2.0] * 4)
        assert result.aggregate.tobytes() == results[0].aggregate.tobytes()


@pytest.mark.parametrize(("strike", "least", "most"), [("kill", 0.0, 1.0), ("late", 4.9, 7.0)])
def test_a_missing_member_fails_the_exchange_and_is_blamed(strike: str, least: float, most: float) -> None:
    results, seconds = run(_exchange(strike))
    assert len(results) == 3 and least <= seconds <= most
    blamed = {peer for result in results for peer in result.failed} | {
        peer for result in results for named in result.accused.values() for peer in named
    }
    assert all(result.aggregate is None for result in results) and len(blamed) == 1


def test_islands_are_found_whichever_way_they_know_each_other() -> None:
    links = {"a": frozenset("b"), "b": frozenset(), "c": frozenset("b"), "d": frozenset("e"), "e": frozenset("x")}
    assert islands(links) == [3, 2]


def test_traffic_is_a_peer_a_second() -> None:
    class Host:
        def __init__(self, messages: int, size: int) -> None:
            count = Count()
            count.messages, count.bytes = messages, size
            self.sent = {"beat": count, "leave": count}

    before = Traffic.of([Host(1, 10)], 2.0)  # type: ignore[list-item]  # all that is asked of a host
    after = Traffic.of([Host(5, 100), Host(2, 20)], 6.0)  # type: ignore[list-item]
    rates = after.since(before)
    assert rates["beats"] == {"messages": 3.0, "bytes": 55.0}
    assert rates["vote"] == {"messages": 0.0, "bytes": 0.0}
    assert before.since(before)["beats"]["messages"] == 0.0
