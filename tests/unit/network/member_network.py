"""A network in memory for tests of membership: hosts that can be killed, frozen and brought back."""

from __future__ import annotations

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.identity import peer_id_of


def peer_number(number: int) -> str:
    """The id of peer 1, 2, ..."""
    return peer_id_of(number.to_bytes(32, "big"))


class MemoryNetwork:
    """All hosts, and how each of them does: up, down (dials are refused) or frozen (no answer)."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.hosts: dict[str, MemoryTransport] = {}
        self.down: set[str] = set()
        self.frozen: set[str] = set()
        self.calls: list[tuple[str, str, str]] = []

    def host(self, number: int) -> MemoryTransport:
        host = MemoryTransport(self, peer_number(number))
        self.hosts[host.peer_id] = host
        return host


class MemoryTransport:
    """The calls of a Transport, at once. Only peers whose addresses were learnt can be dialled."""

    def __init__(self, network: MemoryNetwork, peer_id: str) -> None:
        self.network = network
        self.peer_id = peer_id
        self.handlers = {}
        self.learnt: dict[str, tuple[str, ...]] = {}

    @property
    def address(self) -> str:
        return f"/ip4/10.0.0.1/tcp/1/p2p/{self.peer_id}"

    def learn(self, peer, addresses):
        self.learnt[peer] = tuple(addresses)

    async def serve_call(self, method, handler):
        self.handlers[method] = handler

    async def call(self, peer, method, payload, timeout):
        network = self.network
        network.calls.append((self.peer_id, peer, method))
        if peer not in self.learnt or peer not in network.hosts or peer in network.down:
            raise UnreachableError("refused")
        if peer in network.frozen:
            raise NetworkError("no answer")
        try:
            return await network.hosts[peer].handlers[method](self.peer_id, payload)
        except Exception as error:  # noqa: BLE001 - as over a real network, whatever it was
            raise NetworkError(str(error)) from None
