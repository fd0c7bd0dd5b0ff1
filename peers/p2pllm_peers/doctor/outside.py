"""Outside: the run as its peers tell it, and this machine as they see it.

We dial them as a joining peer would, with a key that nobody will see again, and take part in nothing: no heartbeat is
sent or answered, and no record of us is in the directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from p2pllm.errors import NetworkError
from p2pllm.identity import Identity
from p2pllm.invite import Invite
from p2pllm.network.addresses import is_global
from p2pllm.network.dht import MemberRecord
from p2pllm.network.lookback import Seen, upload_mbit
from p2pllm.network.node import Node
from p2pllm.network.options import Reach
from p2pllm.network.reachability import ASK_S, ROUTER_S, find_relay, own_ports, verdict, views_of_us
from p2pllm.settings import PeerSettings
from p2pllm_peers.doctor.findings import Outside
from p2pllm_peers.entry import Sealed, fetch_manifest
from p2pllm_peers.pace import Pace, ask_pace

MOST_ASKED = 3
"""Peers of the run whose clocks are compared, and who dial back."""

LOOKUPS = 5
"""How often the directory is asked for members, until it knows any."""

UPLOAD_S = 1.5
"""How long the line up is measured."""

Progress = Callable[[str], None]

T = TypeVar("T")


@dataclass(frozen=True)
class Met:
    """What the peers of a run gave and said. pace: None if none told it."""

    sealed: Sealed
    outside: Outside
    pace: Pace | None


async def ask_run(invite: Invite, settings: PeerSettings, folder: Path, progress: Progress) -> Met:
    """Fetch the manifest of an invite, and have its peers tell how this machine looks. folder: private, for sockets.

    Raises UnreachableError if nobody answers, ManifestError for what is no manifest of this run.
    """
    with tempfile.TemporaryDirectory(dir=folder) as keys:
        identity = Identity.load_or_create(Path(keys) / "key")
        progress("starting the network")
        node = await _start(identity, invite, settings, folder)
        try:
            sealed = await fetch_manifest(node, invite, progress)
            progress("asking the run's peers how this machine looks from outside")
            outside, pace = await _ask_peers(node, invite, settings)
        finally:
            await node.stop()
    return Met(sealed, replace(outside, rounds=sealed[0].round.rounds), pace)


async def _start(identity: Identity, invite: Invite, settings: PeerSettings, folder: Path) -> Node:
    """On the port of the settings if it is free: a peer of this machine may be listening there, and at direct_port."""
    own = settings.model_copy(update={"direct_port": 0})
    try:
        return await Node.start(identity, invite.run_id, folder, own, member=False)
    except NetworkError:
        if not settings.listen_port:
            raise
        anywhere = own.model_copy(update={"listen_port": 0})
        return await Node.start(identity, invite.run_id, folder, anywhere, member=False)


async def _ask_peers(node: Node, invite: Invite, settings: PeerSettings) -> tuple[Outside, Pace | None]:
    known = await _peers(node, invite)
    peers = [*known][:MOST_ASKED]
    seen = await views_of_us(node, peers)
    if settings.nat and any(view.took for view in seen) and not any(any(view.took.values()) for view in seen):
        await asyncio.sleep(ROUTER_S)  # a router that opens a port when asked to takes seconds for it
        seen = await views_of_us(node, peers) or seen
    paces = await asyncio.gather(*(_quietly(ask_pace(node, peer, ASK_S)) for peer in peers))
    told = [pace for pace in paces if pace is not None]
    pace = max(told, key=lambda pace: (pace.round, pace.peers), default=None)
    mbit = settings.upload_mbit or (await _quietly(upload_mbit(node, seen[0].peer, UPLOAD_S)) if seen else None)
    relayed = verdict(seen) is Reach.PRIVATE and settings.nat and bool(await find_relay(node, known))
    outside = replace(
        view_of(seen, relayed=relayed, port=next(iter(own_ports(node)), settings.listen_port)),
        asked=len(peers),
        upload_mbit=mbit,
        upload_limited=bool(settings.upload_mbit),
    )
    if pace is not None:
        outside = replace(outside, peers=pace.peers, round=pace.round, swarm_tokens_per_s=pace.tokens_per_s)
    return outside, pace


async def _peers(node: Node, invite: Invite) -> dict[str, tuple[str, ...]]:
    """A few members that we can ask, and where they are, the invite's first, then those that the directory knows."""
    named = dict.fromkeys(address.rpartition("/p2p/")[2] for address in invite.addresses)
    found = {peer: tuple(each for each in invite.addresses if each.endswith(peer)) for peer in named}
    for record in await _records(node):
        found.setdefault(record.peer, record.addresses)
    for peer, addresses in found.items():
        node.learn(peer, addresses)
    return {peer: found[peer] for peer in found if peer != node.peer_id}


async def _records(node: Node) -> Sequence[MemberRecord]:
    """What the directory knows; it has yet to hear of the peer that we just met, so not always at once."""
    for _ in range(LOOKUPS):
        if found := await node.directory.members():
            return found
        await asyncio.sleep(0.3)
    return ()


def view_of(seen: list[Seen], *, relayed: bool, port: int) -> Outside:
    """What several peers' views of us come to: the best of what they could reach, the median of their clocks."""
    if not seen:
        return Outside(why_not="no peer of the run told how this machine looks from there; it may run another version")
    exact = min(seen, key=lambda view: view.round_trip_s)
    tested = [view for view in seen if view.took]
    through = [(view, number) for view in tested for number, took in view.took.items() if took]
    shown = max(through or [(view, port) for view in seen], key=lambda pair: _width(pair[0].host))
    how = "direct" if through else "relay" if relayed else "outgoing" if tested else None
    return Outside(
        clock_skew_s=-statistics.median(view.skew_s for view in seen),
        clock_error_s=exact.round_trip_s / 2,
        how=how,
        scope=_SCOPES[_width(shown[0].host)] if shown[0].host else "",
        seen_as=shown[0].host,
        port=shown[1],
        why_not="" if how else "the run's peers dialled nobody back just now",
    )


_SCOPES = ("this machine", "local network", "internet")


def _width(host: str) -> int:
    """Index into `_SCOPES`: how far away the peer is that sees us at this address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return 0
    return 0 if address.is_loopback else 2 if is_global(host) else 1


async def _quietly(asking: Awaitable[T]) -> T | None:
    with contextlib.suppress(NetworkError):
        return await asking
    return None
