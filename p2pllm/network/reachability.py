"""Reachability: finds out who can dial this machine, and has another one relay for it where nobody can.

Peers of the run dial back (`lookback`). Most of those that see us out on the internet settle it: they get through, and
anybody can dial us; or they do not, also after a router had time to open a port, and nobody can. Then we take a place
at a peer that can be dialled, and others come to us over it. Peers of the same machine or house tell nothing of the
world outside. What does not live here: how p2pd is told (`node`), and what a relay carries (`relays`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from p2pllm.errors import NetworkError
from p2pllm.network.addresses import host_of, is_global, is_relayed, port_of
from p2pllm.network.lookback import Seen, Watcher, look_back
from p2pllm.network.options import Reach
from p2pllm.network.relays import ENOUGH_BYTES

log = logging.getLogger(__name__)

FIRST_S, LAST_S = 3.0, 600.0
"""Pause before the second look, and the longest; each is twice the one before."""

ASK_S = 5.0
"""How long a peer may take to answer, without its dialling."""

ROUTER_S = 11.0
"""After a first failure, how long a router is given to be found and to open a port, of which libp2p takes 10 s; peers
do not dial the same host again for some seconds."""

MOST_ASKED = 3

PATIENCE_S, WATCH_S = 10.0, 2.0
"""Who has had no address at a relay for so long, which is looked at so often, looks for another one; for twice as long
each time after that, until it has one."""

Peers = Mapping[str, Sequence[str]]
"""Addresses by peer id."""


class Reachable(Watcher, Protocol):
    """What is needed of a node."""

    @property
    def reach(self) -> Reach: ...
    def addresses(self) -> list[str]: ...
    def change_reach(self, reach: Reach, relay: str = "") -> None: ...
    async def carries(self, peer: str) -> int: ...


class Reachability:
    """Looks now and then. `run` it."""

    def __init__(
        self,
        node: Reachable,
        peers: Callable[[], Peers],
        give_way: Callable[[], Awaitable[None]],
        on_change: Callable[[Reach], None],
    ) -> None:
        """peers: other members that live now, and where they say that they are. give_way: waits until p2pd may be
        started anew.
        """
        self._node, self._peers, self._give_way, self._on_change = node, peers, give_way, on_change
        self._patience = PATIENCE_S
        self._tried: set[str] = set()  # relays that we have been told to take since we last had one

    async def run(self) -> None:
        """Look for good: soon at first, then seldom, but whenever our relay is gone."""
        pause = FIRST_S
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("who can dial us was not found out")
            await self._rest(pause)
            pause = min(2 * pause, LAST_S)

    async def _rest(self, seconds: float) -> None:
        """Wait so long, or until a relay has been missing for longer than we bear."""
        missing = 0.0
        while seconds > 0 and missing < self._patience:
            await asyncio.sleep(min(WATCH_S, seconds))
            seconds -= WATCH_S
            if self._lacks_relay():
                missing += WATCH_S
            else:
                missing, self._patience = 0.0, PATIENCE_S
                self._tried.clear()

    async def look(self) -> None:
        """Ask once, and have p2pd go by the answer."""
        if self._lacks_relay():
            self._patience = min(2 * self._patience, LAST_S)
            if relay := await self._find_relay():
                return await self._tell(Reach.PRIVATE, relay)
        reach = await self._reach()
        if reach is not Reach.UNKNOWN and reach is not self._node.reach:
            await self._tell(reach, await self._find_relay() if reach is Reach.PRIVATE else "")
        return None

    async def _find_relay(self) -> str:
        found = await find_relay(self._node, self._peers(), self._tried)
        if not found:
            self._tried.clear()  # those that had no place for us may have one the next time
        return found

    async def _tell(self, reach: Reach, relay: str) -> None:
        await self._give_way()
        log.info("who can dial us: %s; relay: %s", reach.value, relay or "none")
        self._tried.add(relay)
        self._node.change_reach(reach, relay)
        self._on_change(reach)

    def _lacks_relay(self) -> bool:
        return self._node.reach is Reach.PRIVATE and not any(map(is_relayed, self._node.addresses()))

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
        # that of IPv6 tells nothing where we listen on IPv4 alone
        kinds = {":" in host_of(each) for each in self._node.addresses() if port_of(each)}
        return [view for view in await views_of_us(self._node, peers) if (":" in view.host) in kinds]


async def views_of_us(node: Reachable, peers: Iterable[str]) -> list[Seen]:
    """How we look to each of these peers that tells."""
    ports = own_ports(node)
    views = await asyncio.gather(*(_view(node, peer, ports) for peer in peers))
    return [view for view in views if view is not None]


def own_ports(node: Reachable) -> list[int]:
    """Where we listen, and where the router listens for us."""
    return list(dict.fromkeys(port for address in node.addresses() if (port := port_of(address))))


async def _view(node: Reachable, peer: str, ports: Sequence[int]) -> Seen | None:
    with suppress(NetworkError):
        return await look_back(node, peer, ports, ASK_S)
    return None


async def find_relay(node: Reachable, peers: Peers, tried: Iterable[str] = ()) -> str:
    """The address of a peer that can be dialled and carries enough, none of those that were tried; "" if there is none.

    Of more than one any, so that all of them relay for some.
    """
    for peer, address in outside(peers):
        with suppress(NetworkError):
            if address not in tried and await node.carries(peer) >= ENOUGH_BYTES:
                return address
    return ""


def outside(peers: Peers) -> list[tuple[str, str]]:
    """Who says to be out on the internet, and where, in any order.

    The addresses are put together anew: p2pd ends at once if it is started with one that it cannot read.
    """
    found = []
    for peer, addresses in peers.items():
        for address in addresses:
            host, port = host_of(address), port_of(address)
            whole = f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}/p2p/{peer}"
            if is_global(host) and port is not None and 0 < port < 1 << 16 and address == whole:
                found.append((peer, whole))
                break
    random.shuffle(found)
    return found


def verdict(views: Iterable[Seen]) -> Reach:
    """What most peers out on the internet that have dialled back found; UNKNOWN where they are of two minds."""
    outside_views = [any(view.took.values()) for view in views if view.took and is_global(view.host)]
    through, not_through = outside_views.count(True), outside_views.count(False)
    if through == not_through:
        return Reach.UNKNOWN
    return Reach.PUBLIC if through > not_through else Reach.PRIVATE
