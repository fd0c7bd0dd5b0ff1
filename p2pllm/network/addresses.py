"""Multiaddresses as the network handles them: checked, ordered, and split into peer and place.

What lives here: texts and bytes. What does not: dialling.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from multiaddr import Multiaddr

from p2pllm.identity import is_peer_id
from p2pllm.invite import MAX_ADDRESS_BYTES, MAX_ADDRESSES

__all__ = [
    "MAX_ADDRESSES",
    "MAX_ADDRESS_BYTES",
    "checked_addresses",
    "host_of",
    "hosts_of",
    "is_global",
    "is_loopback",
    "is_relayed",
    "ordered",
    "port_of",
    "split",
]


def checked_addresses(value: object) -> list[str]:
    """Addresses that a stranger sent, at most 8. Raises ValueError; what they mean is checked when they are
    dialled.
    """
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise ValueError("not a list of at most 8 addresses")
    for text in value:
        if not isinstance(text, str) or len(text) > MAX_ADDRESS_BYTES:
            raise ValueError("an address is no text or too long")
        if not (text.isascii() and text.isprintable() and text.startswith("/")):
            raise ValueError("an address has characters that no address has")
    return list(value)


def split(address: str) -> tuple[str, bytes]:
    """The peer id at the end of an address, and the binary address of the place before it.

    Raises ValueError: not a multiaddress, or without the id of an Ed25519 peer at its end.
    """
    if len(address) > 2 * MAX_ADDRESS_BYTES:
        raise ValueError("an address is too long")
    place, mark, peer = address.rpartition("/p2p/")
    if not mark or not is_peer_id(peer):
        raise ValueError(f"{address} does not end in /p2p/ and a peer id")
    return peer, to_bytes(place)


def to_bytes(address: str) -> bytes:
    """The binary form of an address. Raises ValueError."""
    try:
        return bytes(Multiaddr(address).to_bytes())
    except Exception as error:  # noqa: BLE001 - the parser raises many kinds on strange input
        raise ValueError(f"{address[:MAX_ADDRESS_BYTES]} is not a multiaddress ({error})") from None


def to_text(raw: bytes) -> str:
    """The text of a binary address. Raises ValueError."""
    try:
        return str(Multiaddr(raw))
    except Exception as error:  # noqa: BLE001 - the parser raises many kinds on strange input
        raise ValueError(f"not a binary multiaddress ({error})") from None


def ordered(addresses: Iterable[str]) -> list[str]:
    """Without repetitions, by how many can use them: all, all over a relay, those in the same house, this machine."""
    return sorted(dict.fromkeys(addresses), key=_narrowness)


def _narrowness(address: str) -> int:
    if is_loopback(address):
        return 3
    return 1 if is_relayed(address) else 0 if is_global(host_of(address)) else 2


def is_relayed(address: str) -> bool:
    """Whether the way there leads over a relay."""
    return "/p2p-circuit" in address


def is_global(host: str) -> bool:
    """Whether a text is an IP address out on the internet."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def host_of(address: str) -> str:
    """The IP address in a multiaddress; "" where it has none of its own, as a relay's or one with a name."""
    parts = address.split("/")
    if "p2p-circuit" in parts or len(parts) < 3 or parts[1] not in {"ip4", "ip6"}:
        return ""
    try:
        return str(ipaddress.ip_address(parts[2]))
    except ValueError:
        return ""


def reach(addresses: Iterable[str]) -> str:
    """How the Internet gets to whoever has these: "direct", "relay", or "" if by none of them, as in a lab."""
    kinds = set[str]()
    for address in addresses:
        if is_relayed(address):
            kinds.add("relay")
        elif is_global(host_of(address)):
            kinds.add("direct")
    return min(kinds, default="")


def hosts_of(seen: Iterable[str], said: Iterable[str]) -> list[str]:
    """IP addresses at which to dial a peer. seen: addresses of its connections with us; said: those that it announces.

    What it only says counts where no connection shows better, and only out on the internet: it must not have us dial
    whom it likes in our own networks.
    """
    hosts = [host for host in map(host_of, seen) if host]
    return hosts or [host for host in map(host_of, said) if is_global(host)]


def port_of(address: str) -> int | None:
    """The TCP port in an address, if it has one of its own and is not a relay's."""
    if is_relayed(address):
        return None
    parts = address.split("/")
    if "tcp" in parts[:-1]:
        text = parts[parts.index("tcp") + 1]
        return int(text) if text.isdecimal() else None
    return None
