"""The map of links: what peers tell of theirs, who is asked, and what is made of claims."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.rounds.packing import MAX_ROSTER, MessageError
from p2pllm.testing import MemoryNetwork, virtual
from p2pllm_peers.linkmap import ANSWER_S, ASK_EVERY_S, METHOD, LinkMap, Rate, Rates
from p2pllm_peers.links import Links


class Measured(Links):
    """Links with these rates."""

    def __init__(self, mbit: Mapping[str, float]) -> None:
        super().__init__()
        self.mbit = mbit

    def rows(self) -> list[dict[str, Any]]:
        return [{"peer": peer, "bytes": 1, "mbit": mbit} for peer, mbit in self.mbit.items()]


class Swarm:
    """Three peers with a map each, and how often each was asked."""

    def __init__(self) -> None:
        network = MemoryNetwork()
        self.hosts = [network.host(number) for number in range(3)]
        self.ids = [host.peer_id for host in self.hosts]
        self.asked = 0

    def of(self, at: int, mbit: Mapping[int, float]) -> LinkMap:
        others = [peer for peer in self.ids if peer != self.ids[at]]
        return LinkMap(
            self.hosts[at], Measured({self.ids[other]: rate for other, rate in mbit.items()}), lambda: others
        )

    async def answer_with(self, at: int, reply: bytes) -> None:
        async def answer(peer: str, payload: bytes) -> bytes:
            self.asked += 1
            return reply

        await self.hosts[at].serve_call(METHOD, answer)

    def seen(self, looked: dict[str, Any]) -> dict[tuple[int, int], tuple[float, int]]:
        """Pairs by the numbers of their peers."""
        number = [self.ids.index(peer) for peer in looked["peers"]]
        return {
            (min(number[one], number[other]), max(number[one], number[other])): (mbit, sayers)
            for one, other, mbit, sayers in looked["pairs"]
        }


async def map_of(links: LinkMap) -> dict[str, Any]:
    """What a second look tells, when all have answered."""
    links.look()
    await asyncio.sleep(ANSWER_S)  # of a virtual clock
    return links.look()


@virtual
async def test_each_pair_is_there_once_with_the_smaller_claim() -> None:
    swarm = Swarm()
    ours = swarm.of(0, {1: 8.0})
    await swarm.of(1, {0: 9.5, 2: 20.0}).serve()
    await swarm.of(2, {1: 19.0, 0: 3.0}).serve()
    assert swarm.seen(ours.look()) == {(0, 1): (8.0, 1)}, "nobody was asked yet"
    assert swarm.seen(await map_of(ours)) == {(0, 1): (8.0, 2), (0, 2): (3.0, 1), (1, 2): (19.0, 2)}


@virtual
async def test_nobody_is_asked_often_or_unasked_for() -> None:
    swarm = Swarm()
    ours = swarm.of(0, {})
    await swarm.answer_with(1, Rates(rates=()).pack())
    await asyncio.sleep(10 * ASK_EVERY_S)
    assert swarm.asked == 0
    for _ in range(100):
        ours.look()
        await asyncio.sleep(ASK_EVERY_S / 50)
    assert 2 <= swarm.asked <= 3


STRANGER = MemoryNetwork().host(9).peer_id


def rates(**changes: Any) -> Rates:
    return Rates.model_construct(rates=(Rate.model_construct(**{"peer": STRANGER, "mbit": 1.0} | changes),))


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        rates(mbit=-1.0).pack(),
        rates(mbit=math.nan).pack(),
        rates(mbit=math.inf).pack(),
        rates(peer="nobody").pack(),
        Rates.model_construct(rates=(Rate(peer=STRANGER, mbit=1.0),) * 2).pack(),
    ],
)
@virtual
async def test_what_is_no_answer_changes_nothing(reply: bytes) -> None:
    swarm = Swarm()
    ours = swarm.of(0, {1: 8.0})
    await swarm.answer_with(1, reply)
    assert swarm.seen(await map_of(ours)) == {(0, 1): (8.0, 1)}


@virtual
async def test_who_is_no_member_is_not_on_the_map() -> None:
    swarm = Swarm()
    ours = swarm.of(0, {1: 8.0})
    await swarm.answer_with(1, Rates(rates=(Rate(peer=STRANGER, mbit=1.0),)).pack())
    looked = await map_of(ours)
    assert looked["peers"] == sorted(swarm.ids) and swarm.seen(looked) == {(0, 1): (8.0, 1)}


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        Rates.unpack(data)


def test_a_full_map_fits() -> None:
    hosts = MemoryNetwork()
    full = Rates(rates=tuple(Rate(peer=host.peer_id, mbit=97.531) for host in map(hosts.host, range(MAX_ROSTER))))
    assert Rates.unpack(full.pack()) == full
