"""Reachability: finds out who can dial this machine, and has others relay for it where nobody can.

Peers of the run dial back (`lookback`). One that sees us out on the internet and gets through settles it: anybody can
dial us. Where all of those fail, twice, nobody can, as behind a router: then we reserve places at peers that can be
dialled, and others come to us over these. Peers of the same machine or house tell nothing of the world outside. What
does not live here: how p2pd is told (`node`), and what a relay carries (`relays`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from p2pllm.errors import NetworkError
from p2pllm.network.addresses import host_of, port_of, split
from p2pllm.network.lookback import EVERY_S, Seen, Watcher, look_back
from p2pllm.network.options import Reach
from p2pllm.network.relays import ENOUGH_BYTES

log = logging.getLogger(__name__)

FIRST_S, LAST_S = 3.0, 600.0
"""Pause before the second look, and the longest; each is twice the one before."""

ASK_S = 5.0
"""How long a peer may take to answer, without its dialling."""

ROUTER_S = 1.0 + EVERY_S
"""After a first failure, how long a router is given to open a port; peers do not dial again any sooner."""

MOST_ASKED, MOST_RELAYS = 3, 3

PATIENCE_S, WATCH_S = 10.0, 2.0
"""Who has had no address at a relay for so long, which is looked at so often, looks for other relays."""

Peers = Mapping[str, Sequence[str]]
"""Addresses by peer id."""


class Reachable(Watcher, Protocol):
    """What is needed of a node."""

    @property
    def reach(self) -> Reach: ...
    def addresses(self) -> list[str]: ...
    def change_reach(self, reach: Reach, relays: Iterable[str] = ()) -> None: ...
    async def carries(self, peer: str) -> int: ...


class Reachability:
    """Looks now and then. `run` it."""

    def __init__(self, node: Reachable, peers: Callable[[], Peers], on_change: Callable[[Reach], None]) -> None:
        """peers: other members that live now, and where they say that they are."""
        self._node, self._peers, self._on_change = node, peers, on_change

    async def run(self) -> None:
        """Look for good: soon at first, then seldom, but whenever our relays are gone."""
        pause = FIRST_S
        while True:
            await self.look()
            await self._rest(pause)
            pause = min(2 * pause, LAST_S)

    async def _rest(self, seconds: float) -> None:
        """Wait so long, or until relays have been missing for PATIENCE_S."""
        missing = 0.0
        while seconds > 0 and missing < PATIENCE_S:
            await asyncio.sleep(min(WATCH_S, seconds))
            seconds -= WATCH_S
            missing = missing + WATCH_S if self._lacks_relays() else 0.0

    async def look(self) -> None:
        """Ask once, and have p2pd go by the answer."""
        if self._lacks_relays() and (relays := await find_relays(self._node, self._peers())):
            self._tell(Reach.PRIVATE, relays)
            return
        reach = await self._reach()
        if reach is not Reach.UNKNOWN and reach is not self._node.reach:
            private = reach is Reach.PRIVATE
            self._tell(reach, await find_relays(self._node, self._peers()) if private else [])

    def _lacks_relays(self) -> bool:
        private = self._node.reach is Reach.PRIVATE
        return private and not any("/p2p-circuit" in each for each in self._node.addresses())

    def _tell(self, reach: Reach, relays: Sequence[str] = ()) -> None:
        log.info("who can dial us: %s; relays: %s", reach.value, ", ".join(relays) or "none")
        self._node.change_reach(reach, relays)
        self._on_change(reach)

    async def _reach(self) -> Reach:
        """What the world outside says; UNKNOWN if nobody there was asked."""
        found = verdict(await self._views())
        if found is Reach.PRIVATE:
            await asyncio.sleep(ROUTER_S)
            found = verdict(await self._views())
        return found

    async def _views(self) -> list[Seen]:
        # Those out on the internet first: who comes to us over a relay sees no address of ours.
        peers = [*dict.fromkeys([peer for peer, _ in outside(self._peers())] + [*self._peers()])][:MOST_ASKED]
        ports = list(dict.fromkeys(port for each in self._node.addresses() if (port := port_of(each))))
        views = await asyncio.gather(*(self._view(peer, ports) for peer in peers))
        return [view for view in views if view is not None]

    async def _view(self, peer: str, ports: Sequence[int]) -> Seen | None:
        with suppress(NetworkError):
            return await look_back(self._node, peer, ports, ASK_S)
        return None


async def find_relays(node: Reachable, peers: Peers) -> list[str]:
    """An address of each of a few peers that can be dialled and carry enough."""
    found = list[str]()
    for peer, address in outside(peers):
        with suppress(NetworkError):
            if len(found) < MOST_RELAYS and await node.carries(peer) >= ENOUGH_BYTES:
                found.append(address)
    return found


def outside(peers: Peers) -> list[tuple[str, str]]:
    """Who says to be out on the internet, and where; in any order, so that each is asked by some."""
    found = []
    for peer, addresses in peers.items():
        direct = next((each for each in addresses if is_global(host_of(each)) and _is_of(peer, each)), "")
        if direct:
            found.append((peer, direct))
    random.shuffle(found)
    return found


def verdict(views: Iterable[Seen]) -> Reach:
    """What peers' views of us come to: those of peers out on the internet that have dialled back count."""
    outside = [view for view in views if view.took and is_global(view.host)]
    if any(any(view.took.values()) for view in outside):
        return Reach.PUBLIC
    return Reach.PRIVATE if outside else Reach.UNKNOWN


def is_global(host: str) -> bool:
    """Whether a text is an IP address out on the internet."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_global
    return False


def _is_of(peer: str, address: str) -> bool:
    with suppress(ValueError):
        return split(address)[0] == peer
    return False
