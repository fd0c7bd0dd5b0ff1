"""Relays: how much a peer's p2pd carries between two others that cannot dial each other (libp2p's circuit relay v2).

p2pd makes its relay twice, with the limits that it was started with and with those of libp2p: 128 KiB and two minutes a
circuit, which no exchange fits in. Which of both answers is up to chance at each start. So whoever wants to relay asks
itself, from a second p2pd, and starts anew until the right one does; and whoever needs a relay asks before it takes
one. What does not live here: who needs a relay (`reachability`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import tempfile
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from hivemind.p2p import PeerID

from p2pllm.errors import NetworkError, P2PLLMError
from p2pllm.identity import Identity
from p2pllm.network.addresses import to_bytes
from p2pllm.network.control import Control
from p2pllm.network.options import P2pdOptions
from p2pllm.network.p2pd import P2pd
from p2pllm.network.streams import Traffic

ENOUGH_BYTES = 1 << 30
"""A relay that carries less on a circuit, each way, is none for us."""

ASK_S = 5.0

_HOP = "/libp2p/circuit/relay/0.2.0/hop"
_RESERVE = b"\x02\x08\x00"  # a HopMessage of 2 bytes, its type RESERVE
_LIMIT, _STATUS, _DATA, _OK = 4, 5, 2, 100  # fields of HopMessage, and of its Limit; the status of success
_UNLIMITED = 1 << 62


class Opener(Protocol):
    """What opens streams of any protocol of p2pd's."""

    async def open_stream(self, peer_id: PeerID, proto: str) -> tuple[StreamReader, StreamWriter]:
        """Raises NetworkError."""
        ...


async def carries(control: Opener, peer: str) -> int:
    """Bytes that a peer's p2pd carries for us on one circuit, each way; 0 if it does not relay.

    To ask is to reserve a place there, for an hour. Raises NetworkError if it does not answer.
    """
    try:
        async with asyncio.timeout(ASK_S):
            reader, writer = await control.open_stream(PeerID.from_base58(peer), _HOP)
            try:
                writer.write(_RESERVE)
                await writer.drain()
                return granted(await _read_framed(reader))
            finally:
                writer.close()
    except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
        raise NetworkError(f"Peer {peer[-8:]} does not say whether it relays: {error or 'no answer'}.") from None


def granted(answer: bytes) -> int:
    """Bytes that a HopMessage, the answer to a reservation, lets each side send; 0 if it refuses.

    Raises ValueError for what is no such message.
    """
    fields = dict(_fields(answer))
    if fields.get(_STATUS) != _OK:
        return 0
    limit = fields.get(_LIMIT)
    data = dict(_fields(limit)).get(_DATA, 0) if isinstance(limit, bytes) else 0
    return data if isinstance(data, int) and data else _UNLIMITED


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message of integers and of byte strings. Raises ValueError."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2 and at + value <= len(message):
            yield tag >> 3, message[at : at + value]
            at += value
        else:
            raise ValueError("a field is of another kind or too long")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at a place, at most 64 bits, and the place after it. Raises ValueError."""
    number = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number has no end")


async def _read_framed(reader: StreamReader) -> bytes:
    """A message of at most 16 KiB, after its length. Raises ValueError, EOFError, OSError."""
    head = await reader.readexactly(1)
    if head[0] >= 0x80:
        head += await reader.readexactly(1)
    size, _ = _varint(head, 0)
    return await reader.readexactly(size)


async def own_carries(options: P2pdOptions, peer: str) -> int:
    """The same of our own p2pd, which cannot ask itself: a second one does, for a moment.

    options: of ours, with its port. peer: our id. Raises P2PLLMError if that cannot be done.
    """
    kind, home = ("ip6", "::1") if ":" in options.listen_host else ("ip4", "127.0.0.1")
    any_host = ipaddress.ip_address(options.listen_host).is_unspecified
    place = f"/{kind}/{home if any_host else options.listen_host}/tcp/{options.listen_port}"
    with tempfile.TemporaryDirectory(prefix="", dir=options.runtime_dir) as folder:
        Identity.load_or_create(Path(folder) / "key")
        asking = P2pdOptions(
            Path(folder) / "key",
            Path(folder),
            listen_host=home,
            nat=False,
            relay_service=False,
            startup_timeout_s=options.startup_timeout_s,
        )
        p2pd = await P2pd.start(asking)
        try:
            control = await Control.open(p2pd.control_socket, p2pd.stream_socket, Traffic())
            try:
                async with asyncio.timeout(ASK_S):
                    await control.connect(PeerID.from_base58(peer), [to_bytes(place)])
                return await carries(control, peer)
            finally:
                await control.close()
        finally:
            await p2pd.stop()


async def relays_well(options: P2pdOptions, peer: str) -> bool:
    """Whether our own p2pd carries enough for others; True where that cannot be found out."""
    with contextlib.suppress(P2PLLMError, OSError, ValueError):
        return await own_carries(options, peer) >= ENOUGH_BYTES
    return True
