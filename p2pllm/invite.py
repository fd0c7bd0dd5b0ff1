"""Invite: one line of text that lets somebody join a run.

It names the run, the founder's key (which signs the manifest) and a few addresses of peers. It is lower-case
base32, so that no shell, chat program or web address changes it, and it ends in a checksum that finds typing
errors. What does not live here: secrets (an invite may be published) and whether anybody answers (`network`).

Bytes: version, length of all (2), checked part, checksum (6). The checked part of version 1: run id (32),
founder's key (32), number of further keys, these keys (32 each), number of addresses, and for each address
the number of its key (0 is the founder), its length, and its binary multiaddress.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from blake3 import blake3
from multiaddr import Multiaddr

from p2pllm.errors import InviteError
from p2pllm.identity import PUBLIC_KEY_BYTES, is_peer_id, peer_id_of, public_key_of

MAX_ADDRESSES = 8
"""Addresses in one invite."""

MAX_ADDRESS_BYTES = 192
"""Bound on the text of one address; one through a relay names two peers and has about 150."""

_PREFIX = "p2pllm:"
_VERSION = 1
_HEAD = 3
_CHECKSUM = 6
_SHORTEST = _HEAD + 2 * PUBLIC_KEY_BYTES + 2 + _CHECKSUM
_LONGEST_TEXT = 4096
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_DIGITS = {character: value for value, character in enumerate(_ALPHABET)}
_AROUND = " \t\r\n\"'`<>()[]{}.,;"
"""What people and programs put around an invite; none of it is in the alphabet."""


@dataclass(frozen=True)
class Invite:
    """How to find a run.

    run_id: 64 hex digits. founder: peer id. addresses: 1 to 8 multiaddresses; those without a /p2p/ID at their end are
    the founder's, and get it added; all are brought into their usual spelling. Raises InviteError for values that no
    run has.
    """

    run_id: str
    founder: str
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.run_id):
            raise InviteError("An invite needs a run id of 64 hex digits.")
        if not is_peer_id(self.founder):
            raise InviteError(f'"{self.founder[:64]}" is not the id of a founder.')
        if not 1 <= len(self.addresses) <= MAX_ADDRESSES:
            raise InviteError(f"An invite has 1 to {MAX_ADDRESSES} addresses, not {len(self.addresses)}.")
        whole = tuple(_whole(address, self.founder) for address in self.addresses)
        object.__setattr__(self, "addresses", whole)

    def encode(self) -> str:
        """The invite as one token of lower-case letters, digits and one colon."""
        keys = [self.founder]
        places = bytearray()
        for address in self.addresses:
            place, _, peer = address.rpartition("/p2p/")
            if peer not in keys:
                keys.append(peer)
            raw = _to_bytes(place)
            places += bytes((keys.index(peer), len(raw))) + raw
        body = bytes.fromhex(self.run_id) + public_key_of(self.founder)
        body += bytes((len(keys) - 1,)) + b"".join(public_key_of(peer) for peer in keys[1:])
        body += bytes((len(self.addresses),)) + places
        head = bytes((_VERSION,)) + (_HEAD + len(body) + _CHECKSUM).to_bytes(2, "big")
        return _PREFIX + _base32(head + body + _checksum(head + body))

    @classmethod
    def decode(cls, text: str) -> Invite:
        """Read an invite as people paste it: in other case, or between spaces, quotes or brackets.

        Raises InviteError that says which: no invite at all, cut off, mistyped, or of a newer version.
        """
        token = text[: 2 * _LONGEST_TEXT].strip(_AROUND)
        if token[: len(_PREFIX)].lower() != _PREFIX:
            raise InviteError(f'This is not an invite: an invite is one word that starts with "{_PREFIX}".')
        data = _unbase32(token[len(_PREFIX) :].lower())
        if len(data) < _SHORTEST or len(data) < int.from_bytes(data[1:3], "big"):
            raise InviteError("The invite is cut off (or mistyped near its start); copy all of it.")
        if _checksum(data[:-_CHECKSUM]) != data[-_CHECKSUM:]:
            raise InviteError("The invite is mistyped: its checksum does not fit; copy it again.")
        if data[0] != _VERSION:
            raise InviteError(f"The invite is of version {data[0]}, newer than this program; upgrade p2pllm.")
        try:
            return _parse(data[_HEAD:-_CHECKSUM])
        except (ValueError, IndexError):
            raise InviteError("The invite is damaged although its checksum fits; ask for a new one.") from None


def _whole(address: str, founder: str) -> str:
    """The address with a peer id at its end. Raises InviteError."""
    place, mark, peer = address.rpartition("/p2p/")
    if not mark or not is_peer_id(peer):
        place, peer = address, founder
    if len(f"{place}/p2p/{peer}".encode()) > MAX_ADDRESS_BYTES:
        raise InviteError(f"The address {place[:60]}… is longer than {MAX_ADDRESS_BYTES} bytes.")
    try:
        usual = _to_text(_to_bytes(place))  # of several ways to write an address the one that decoding will give
    except ValueError:
        usual = ""
    if not usual.strip("/"):
        raise InviteError(f"{address} is not an address like /ip4/192.0.2.1/tcp/4001.")
    return f"{usual}/p2p/{peer}"


def _parse(body: bytes) -> Invite:
    """The checked part of version 1. Raises ValueError, IndexError or InviteError."""
    reader = _Reader(body)
    run_id = reader.take(32).hex()
    founder = peer_id_of(reader.take(PUBLIC_KEY_BYTES))
    keys = [founder] + [peer_id_of(reader.take(PUBLIC_KEY_BYTES)) for _ in range(reader.byte(MAX_ADDRESSES))]
    addresses = []
    for _ in range(reader.byte(MAX_ADDRESSES)):
        peer = keys[reader.byte(MAX_ADDRESSES)]
        addresses.append(f"{_to_text(reader.take(reader.byte(MAX_ADDRESS_BYTES)))}/p2p/{peer}")
    reader.end()
    return Invite(run_id, founder, tuple(addresses))


class _Reader:
    """Takes bytes from the front. Raises ValueError where there are none."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise ValueError("too short")
        self._at += count
        return part

    def byte(self, most: int) -> int:
        value = self.take(1)[0]
        if value > most:
            raise ValueError("a number is too large")
        return value

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError("too long")


def _checksum(data: bytes) -> bytes:
    return blake3(b"p2pllm/invite\0" + data).digest(length=_CHECKSUM)


def _base32(data: bytes) -> str:
    """Base32 without padding; the unused bits of the last character are zero."""
    bits = -len(data) * 8 % 5
    number = int.from_bytes(data, "big") << bits
    length = (len(data) * 8 + bits) // 5
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(length)))


def _unbase32(text: str) -> bytes:
    """The bytes of a base32 text. Raises InviteError."""
    if len(text) > _LONGEST_TEXT:
        raise InviteError("This is too long for an invite.")
    number = 0
    for position, character in enumerate(text, 1):
        digit = _DIGITS.get(character)
        if digit is None:
            raise InviteError(
                f"The invite is mistyped: {character!r} (character {position} after the colon) is in none."
            )
        number = number << 5 | digit
    spare = len(text) * 5 % 8
    if spare >= 5 or number & ((1 << spare) - 1):
        # no whole number of bytes makes this text, so characters are missing or were added
        raise InviteError("The invite is cut off or mistyped near its end; copy all of it.")
    return (number >> spare).to_bytes(len(text) * 5 // 8, "big")


def _to_bytes(address: str) -> bytes:
    try:
        raw = bytes(Multiaddr(address).to_bytes())
    except Exception as error:  # noqa: BLE001 - the parser raises many kinds on strange input
        raise ValueError(f"not a multiaddress: {error}") from None
    if len(raw) > MAX_ADDRESS_BYTES:
        raise ValueError("a multiaddress is too long")
    return raw


def _to_text(raw: bytes) -> str:
    try:
        return str(Multiaddr(raw))
    except Exception as error:  # noqa: BLE001 - the parser raises many kinds on strange input
        raise ValueError(f"not a multiaddress: {error}") from None
