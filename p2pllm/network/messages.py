"""Bounded msgpack: how small messages of the network are packed, and how strangers' ones are opened.

What does not live here: what the messages mean.
"""

from __future__ import annotations

from typing import Any

import msgpack


def pack(value: object) -> bytes:
    """msgpack of plain values (None, numbers, text, bytes, lists, dictionaries)."""
    return bytes(msgpack.packb(value, use_bin_type=True))


def unpack(data: bytes, max_bytes: int) -> Any:
    """Open a message of at most `max_bytes` bytes; extension types are refused. Raises ValueError, nothing
    else.
    """
    if len(data) > max_bytes:
        raise ValueError(f"a message of {len(data)} bytes")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=max_bytes,
            max_bin_len=max_bytes,
            max_array_len=max_bytes,
            max_map_len=max_bytes,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        raise ValueError(f"not a message: {error}") from None
