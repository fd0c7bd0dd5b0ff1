"""Who can dial us: what the answers come to, when others relay for us, and what follows when they are gone."""

from __future__ import annotations

import asyncio

import pytest

from p2pllm.errors import NetworkError
from p2pllm.network.lookback import Seen
from p2pllm.network.options import Reach
from p2pllm.network.reachability import PATIENCE_S, ROUTER_S, Reachability, find_relay, outside, verdict
from p2pllm.testing import peer_number, virtual

OUT, HOUSE = "8.8.4.4", "192.168.1.7"


def seen(host: str, *took: bool) -> Seen:
    return Seen("peer", 0.0, 0.1, host, dict(enumerate(took)))


@pytest.mark.parametrize(
    ("views", "reach"),
    [
        ([seen(OUT, True)], Reach.PUBLIC),
        ([seen(OUT, False, True)], Reach.PUBLIC),
        ([seen(OUT, False), seen(OUT, True)], Reach.UNKNOWN),
        ([seen(OUT, False), seen(OUT, True), seen(OUT, False)], Reach.PRIVATE),
        ([seen(OUT, False)], Reach.PRIVATE),
        ([seen(OUT, False), seen(HOUSE, True)], Reach.PRIVATE),
        ([seen(HOUSE, True)], Reach.UNKNOWN),
        ([seen(HOUSE, False)], Reach.UNKNOWN),
        ([seen(OUT)], Reach.UNKNOWN),
        ([seen("")], Reach.UNKNOWN),
        ([], Reach.UNKNOWN),
    ],
)
def test_most_of_those_outside_who_have_dialled_back_settle_it(views: list[Seen], reach: Reach) -> None:
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
        self.told: list[tuple[Reach, str]] = []
        self.relayed = True
        self.host = OUT

    def addresses(self) -> list[str]:
        circuit = [f"{place(1)}/p2p-circuit/p2p/{self.peer_id}"] * (self.relayed and self.reach is Reach.PRIVATE)
        return [place(0, HOUSE), *circuit]

    def change_reach(self, reach: Reach, relay: str = "") -> None:
        self.reach = reach
        self.told.append((reach, relay))

    async def carries(self, peer: str) -> int:
        if peer not in self.relaying:
            raise NetworkError("nobody there")
        return self.relaying[peer]


def reachability(node: FakeNode, monkeypatch: pytest.MonkeyPatch, peers: dict[str, list[str]]) -> Reachability:
    async def look_back(_: object, peer: str, ports: list[int], timeout: float) -> Seen:
        assert ports == [4001]
        return Seen(peer, 0.0, 0.1, node.host, {4001: node.takes})

    monkeypatch.setattr("p2pllm.network.reachability.look_back", look_back)

    async def give_way() -> None:
        pass

    return Reachability(node, lambda: peers, give_way, lambda reach: None)  # type: ignore[arg-type]


PEERS = {peer_number(number): [place(number, HOUSE), place(number)] for number in (1, 2)}


@virtual
async def test_who_cannot_be_dialled_is_relayed_for_by_one_that_carries_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    node.relaying[peer_number(2)] = 1 << 17
    await reachability(node, monkeypatch, PEERS).look()
    assert node.told == [(Reach.PRIVATE, place(1))]


@virtual
async def test_a_router_has_time_to_open_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    asyncio.get_running_loop().call_later(ROUTER_S - 1, lambda: setattr(node, "takes", True))
    await reachability(node, monkeypatch, PEERS).look()
    assert node.told == [(Reach.PUBLIC, "")]


@virtual
async def test_a_house_tells_nothing_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    node.host = HOUSE
    await reachability(node, monkeypatch, PEERS).look()
    assert node.told == []


@virtual
async def test_another_relay_is_found_when_ours_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    running = asyncio.create_task(reachability(node, monkeypatch, PEERS).run())
    await asyncio.sleep(200)
    assert node.told == [(Reach.PRIVATE, place(1))], "it is told once"
    node.relayed, node.relaying = False, {}
    await asyncio.sleep(60)
    assert len(node.told) == 1, "while nobody relays there is nothing to tell"
    node.relaying = {peer_number(2): 1 << 40}
    await asyncio.sleep(90)
    assert node.told[1] == (Reach.PRIVATE, place(2))
    node.relayed, node.takes = True, True
    await asyncio.sleep(700)
    assert node.told[-1] == (Reach.PUBLIC, ""), "the port is open by now"
    running.cancel()


@virtual
async def test_who_says_to_relay_and_does_not_is_not_taken_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    node.relayed = False
    node.relaying = {peer_number(1): 1 << 40, peer_number(2): 1 << 40}
    running = asyncio.create_task(reachability(node, monkeypatch, PEERS).run())
    await asyncio.sleep(8 * PATIENCE_S)
    assert {relay for _, relay in node.told[:2]} == {place(1), place(2)}
    await asyncio.sleep(3600)
    assert len(node.told) < 16, "p2pd is started anew less and less often"
    running.cancel()


@virtual
async def test_a_look_that_fails_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    node = FakeNode()
    look = reachability(node, monkeypatch, PEERS)
    monkeypatch.setattr(look, "_on_change", lambda reach: 1 // 0)
    running = asyncio.create_task(look.run())
    await asyncio.sleep(100)
    assert node.reach is Reach.PRIVATE
    node.takes = True
    await asyncio.sleep(1300)
    assert node.reach is Reach.PUBLIC
    running.cancel()


@pytest.mark.parametrize(
    "address",
    [
        place(2),
        place(1, HOUSE),
        "nonsense",
        f"/ip4/{OUT}/unix/x/p2p/{peer_number(1)}",
        f"/ip4/{OUT}/tcp/0/p2p/{peer_number(1)}",
        f"/ip4/{OUT}/tcp/4001,x/p2p/{peer_number(1)}",
        f"/ip4/{OUT}/tcp/4001/ws/p2p/{peer_number(1)}",
        f"/ip4/{OUT}/tcp/4001/p2p/{peer_number(1)}/p2p-circuit/p2p/{peer_number(1)}",
    ],
)
async def test_only_a_plain_address_of_a_peers_own_is_given_to_p2pd(address: str) -> None:
    assert outside({peer_number(1): [address]}) == []
    assert outside({peer_number(1): [address, place(1)]}) == [(peer_number(1), place(1))]
    assert await find_relay(FakeNode(), {peer_number(1): [address]}) == ""  # type: ignore[arg-type]
