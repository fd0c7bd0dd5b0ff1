"""How p2pd's control protocol looks on the wire: framed protobuf messages, and its errors as sentences.

What lives here: bytes and texts. What does not: connections (`control`).
"""

from __future__ import annotations

from asyncio import StreamReader, StreamWriter
from pathlib import Path

from google.protobuf.message import DecodeError, Message
from hivemind.p2p import PeerID

from p2pllm.errors import NetworkError, UnreachableError

MAX_MESSAGE_BYTES = 4 << 20
"""p2pd's own bound on one message; it exits when it is given more."""

_UNREACHABLE = ("failed to dial", "no addresses", "failed to find any peer", "routing: not found", "no route")
_LOST = ("stream reset", "EOF", "connection reset", "broken pipe", "closed", "Application error")


def failure(peer: PeerID, message: str) -> NetworkError:
    """What p2pd reports as one sentence: UnreachableError where nobody is there (any more), else
    NetworkError.
    """
    name = short(peer.to_base58())
    if any(mark in message for mark in _UNREACHABLE):
        return UnreachableError(f"Peer {name} cannot be reached: {_dial_reason(message)}.")
    if "protocols not supported" in message:
        return NetworkError(f"Peer {name} does not offer this; it is starting, stopping or runs another version.")
    if any(mark in message for mark in _LOST):
        return UnreachableError(f"The connection to peer {name} was lost ({one_line(message)[:80]}).")
    return NetworkError(f"Peer {name}: {one_line(message)}.")


def one_line(text: str) -> str:
    """What another machine said, fit for a sentence on a terminal: printable, in one line, at most 200
    characters.
    """
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def short(peer: str) -> str:
    """The end of a peer id, which tells peers apart (all ids start alike)."""
    return peer[-8:]


def _dial_reason(message: str) -> str:
    for mark, reason in (
        ("connection refused", "connection refused"),
        ("peer id mismatch", "another peer has its address"),
        ("dial backoff", "it was not there a moment ago"),
        ("no addresses", "no address is known"),
        ("failed to find any peer", "no address is known"),
        ("not found", "no address is known"),
        ("timeout", "no answer"),
    ):
        if mark in message:
            return reason
    return one_line(message.rsplit("] ", 1)[-1])[:120]


def unix_address(path: Path) -> bytes:
    """The binary multiaddress /unix/PATH: its protocol code (400) and the length as varints, then the path."""
    raw = str(path).encode()
    return _varint(400) + _varint(len(raw)) + raw


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def framed(message: Message) -> bytes:
    raw = bytes(message.SerializeToString())
    return _varint(len(raw)) + raw


async def write_message(writer: StreamWriter, message: Message) -> None:
    writer.write(framed(message))
    await writer.drain()


async def read_message(reader: StreamReader, message: Message) -> Message:
    """Read one length-prefixed message into `message`. Raises DecodeError, IncompleteReadError, OSError."""
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
        if shift > 28:
            raise DecodeError("a length of more than four bytes")
    if length > MAX_MESSAGE_BYTES + 4096:
        raise DecodeError(f"a message of {length} bytes")
    message.ParseFromString(await reader.readexactly(length))
    return message
