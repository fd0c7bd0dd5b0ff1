"""AddressBook: where peers live, and which of them p2pd has heard of. Bounded, so strangers cannot fill it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from p2pllm.network.addresses import MAX_ADDRESSES, split

MAX_PEERS = 256
"""Peers whose addresses are remembered; the oldest hearsay is forgotten first."""

_MAX_MET = 4 * MAX_PEERS


class AddressBook:
    """Addresses by peer id. `met` are the peers that this p2pd can dial, or is connected with."""

    def __init__(self) -> None:
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._met: set[str] = set()

    def learn(self, peer: str, addresses: Iterable[str]) -> None:
        """Replace the addresses of a peer; none at all change nothing. They are parsed when they are used."""
        known = tuple(addresses)[:MAX_ADDRESSES]
        if not known or self._addresses.get(peer) == known:
            return
        self._addresses.pop(peer, None)
        self._addresses[peer] = known
        self._met.discard(peer)  # p2pd has not heard of these
        if len(self._addresses) > MAX_PEERS:
            # hearsay goes first: it must not displace peers that we really talk with
            victims = (other for other in self._addresses if other not in self._met and other != peer)
            del self._addresses[next(victims, next(iter(self._addresses)))]

    def __contains__(self, peer: str) -> bool:
        return peer in self._addresses

    def places(self, peer: str) -> list[bytes]:
        """Binary addresses of a peer: those that are well formed and name this peer."""
        places = []
        for address in self._addresses.get(peer, ()):
            with contextlib.suppress(ValueError):
                known, place = split(address)
                if known == peer:
                    places.append(place)
        return places

    def texts(self, peer: str) -> tuple[str, ...]:
        """The addresses of a peer as they were learned."""
        return self._addresses.get(peer, ())

    def meet(self, peer: str) -> bool:
        """Note that p2pd knows the peer; False if that was known."""
        if peer in self._met:
            return False
        if len(self._met) >= _MAX_MET:
            self._met.clear()  # costs one more dialling request each, nothing else
        self._met.add(peer)
        return True

    def has_met(self, peer: str) -> bool:
        """Whether p2pd can dial the peer without our help."""
        return peer in self._met

    def lose(self, peer: str) -> None:
        """p2pd could not reach the peer; the next call offers our addresses again."""
        self._met.discard(peer)

    def forget_met(self) -> set[str]:
        """After a restart p2pd knows nobody; returns whom it knew."""
        met, self._met = self._met, set()
        return met
