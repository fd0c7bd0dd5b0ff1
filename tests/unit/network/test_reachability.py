"""Who can dial us: what the answers come to, when others relay for us, and what follows when they are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from p2pllm.errors import NetworkError
from p2pllm.network.lookback import Seen
from p2pllm.network.options import Reach
from p2pllm.network.reachability import MOST_RELAYS, Reachability, find_relays, verdict
from p2pllm.testing import peer_number, virtual

OUT, HOUSE = "8.8.4.4", "192.168.1.7"


def seen(host: str, *took: bool) -> Seen:
    return Seen("peer", 0.0, 0.1, host, dict(enumerate(took)))


@pytest.mark.parametrize(
    ("views", "reach"),
    [
        ([seen(OUT, True)], Reach.PUBLIC),
        ([seen(OUT, False, True)], Reach.PUBLIC),
        ([seen(OUT, False), seen(OUT, True)], Reach.PUBLIC),
        ([seen(OUT, False)], Reach.PRIVATE),
        ([seen(OUT, False), seen(HOUSE, True)], Reach.PRIVATE),
        ([seen(HOUSE, True)], Reach.UNKNOWN),
        ([seen(HOUSE, False)], Reach.UNKNOWN),
        ([seen(OUT)], Reach.UNKNOWN),
        ([seen("")], Reach.UNKNOWN),
        ([], Reach.UNKNOWN),
    ],
)
def test_only_those_outside_who_have_dialled_back_count(views: list[Seen], reach: Reach) -> None:
    assert verdict(views) is reach


def place(number: int, host: str = OUT) -> str:
    return f"/ip4/{host}/tcp/4001/p2p/{peer_number(number)}"


class FakeNode:
    """A node whose peers see it as the test says."""

    def __init__(self) -> None:
        self.peer_id = peer_number(0)
        self.reach = Reach.UNKNOWN
        self.takes = False
        self.relaying = {peer_number(1): 1 << 40}
        self.told: list[tuple[Reach, list[str]]] = []
        self.relayed = True
        self.host = OUT

    def addresses(self) -> list[str]:
        circuit = [f"{place(1)}/p2p-circuit/p2p/{self.peer_id}"] * (self.relayed and self.reach is Reach.PRIVATE)
        return [place(0, HOUSE), *circuit]

    def change_reach(self, reach: Reach, relays: Iterable[str] = ()) -> None:
        self.reach = reach
        self.told.append((reach, list(relays)))

    async def carries(self, peer: str) -> int:
        if peer not in self.relaying:
            raise NetworkError("nobody there")
        return self.relaying[peer]


def reachability(node: FakeNode, monkeypatch: pytest.MonkeyPatch, peers: dict[str, list[str]]) -> Reachability:
    async def look_back(_: object, peer: str, ports: list[int], timeout: float) -> Seen:
        assert ports == [4001]
        return Seen(peer, 0.0, 0.1, node.host, {4001: node.takes})

    monkeypatch.setattr("p2pllm.network.reachability.look_back", look_back)
    return Reachability(node, lambda: peers, lambda reach: None)  # type: ignore[arg-type]


PEERS = {peer_number(number): [place(number, HOUSE), place(number)] for number in (1, 2)}


@virtual
async def test_who_cannot_be_dialled_is_relayed_for_by_those_who_carry_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    node.relaying[peer_number(2)] = 1 << 17
    await reachability(node, monkeypatch, PEERS).look()
    assert node.told == [(Reach.PRIVATE, [place(1)])]


@virtual
async def test_a_router_has_time_to_open_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    asyncio.get_running_loop().call_later(3.0, lambda: setattr(node, "takes", True))
    await reachability(node, monkeypatch, PEERS).look()
    assert node.told == [(Reach.PUBLIC, [])]


@virtual
async def test_a_house_tells_nothing_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    node.host = HOUSE
    await reachability(node, monkeypatch, PEERS).look()
    assert node.told == []


@virtual
async def test_other_relays_are_found_when_ours_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    running = asyncio.create_task(reachability(node, monkeypatch, PEERS).run())
    await asyncio.sleep(200)
    assert node.told == [(Reach.PRIVATE, [place(1)])], "it is told once"
    node.relayed, node.relaying = False, {}
    await asyncio.sleep(60)
    assert len(node.told) == 1, "while nobody relays there is nothing to tell"
    node.relaying = {peer_number(2): 1 << 40}
    await asyncio.sleep(30)
    assert node.told[1] == (Reach.PRIVATE, [place(2)])
    node.relayed, node.takes = True, True
    await asyncio.sleep(700)
    assert node.told[-1] == (Reach.PUBLIC, []), "the router has a port open by now"
    running.cancel()


async def test_few_relays_are_taken_and_none_that_has_no_address_outside() -> None:
    node = FakeNode()
    node.relaying = {peer_number(number): 1 << 40 for number in range(1, 9)}
    peers = {peer_number(number): [place(number)] for number in range(1, 8)} | {peer_number(8): [place(8, HOUSE)]}
    found = await find_relays(node, peers)  # type: ignore[arg-type]
    assert len(found) == MOST_RELAYS and set(found) <= {place(number) for number in range(1, 8)}
    wrong = {peer_number(1): [place(2)], peer_number(3): ["nonsense"]}
    assert await find_relays(node, wrong) == []  # type: ignore[arg-type]
