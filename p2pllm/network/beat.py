"""Beat: the message that members exchange, packed, and opened with bounds.

What does not live here: when it is sent (`membership`) and what the status means.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field

from p2pllm.identity import is_peer_id
from p2pllm.network.addresses import MAX_ADDRESSES, checked_addresses
from p2pllm.network.messages import pack, unpack

MAX_STATUS_BYTES = 4096
"""Bound on the owner's part of a beat."""

MAX_HINTS = 16
"""Members that one beat tells of."""

MAX_HINT_ADDRESSES = 4
"""Addresses of each of them."""

MAX_BEAT_BYTES = 64 * 1024
"""Bound on a packed beat."""

_VERSION = 1

_PLAIN_BYTES = 512
"""Beats up to this size are opened once and remembered."""


@dataclass(frozen=True)
class Beat:
    """status: opaque bytes. addresses: the sender's own, or none. hints: addresses of other members by peer
    id.
    """

    status: bytes
    addresses: tuple[str, ...] = ()
    hints: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Packed; of too many hints a random choice. Raises ValueError for a status above 4 KiB."""
        if len(self.status) > MAX_STATUS_BYTES:
            raise ValueError(f"a status of {len(self.status)} bytes; {MAX_STATUS_BYTES} are allowed")
        chosen = list(self.hints.items())
        if len(chosen) > MAX_HINTS:
            chosen = random.sample(chosen, MAX_HINTS)
        hints = [[peer, list(addresses[:MAX_HINT_ADDRESSES])] for peer, addresses in chosen]
        return pack([_VERSION, self.status, list(self.addresses[:MAX_ADDRESSES]), hints])

    @classmethod
    def decode(cls, data: bytes) -> Beat:
        """Open a stranger's beat. Raises ValueError, nothing else."""
        return _opened(data) if len(data) <= _PLAIN_BYTES else cls._open(data)

    @classmethod
    def _open(cls, data: bytes) -> Beat:
        fields = unpack(data, MAX_BEAT_BYTES)
        if not isinstance(fields, list) or len(fields) != 4 or fields[0] != _VERSION:
            raise ValueError("not a beat of this version")
        _, status, addresses, hints = fields
        if not isinstance(status, bytes) or len(status) > MAX_STATUS_BYTES:
            raise ValueError("the status of a beat is no bytes or too long")
        if not isinstance(hints, list) or len(hints) > MAX_HINTS:
            raise ValueError("the hints of a beat are no list or too many")
        return cls(status, tuple(checked_addresses(addresses)), dict(_hint(hint) for hint in hints))


@functools.lru_cache(maxsize=4096)  # most beats carry a status alone, and that of the beat before
def _opened(data: bytes) -> Beat:
    return Beat._open(data)


@functools.lru_cache(maxsize=64)
def plain(status: bytes) -> bytes:
    """The packed beat that carries a status alone. Raises ValueError for one above 4 KiB."""
    return Beat(status).encode()


def _hint(value: object) -> tuple[str, tuple[str, ...]]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        raise ValueError("a hint is not a peer id and addresses")
    try:
        return _checked(value[0], tuple(value[1]))
    except TypeError:  # not even text
        raise ValueError("a hint is not a peer id and addresses") from None


@functools.lru_cache(maxsize=16384)  # everybody tells of the same few hundred members, all the time
def _checked(peer: object, addresses: tuple[object, ...]) -> tuple[str, tuple[str, ...]]:
    if not is_peer_id(peer):
        raise ValueError("a hint is not a peer id and addresses")
    return str(peer), tuple(checked_addresses(list(addresses))[:MAX_HINT_ADDRESSES])
