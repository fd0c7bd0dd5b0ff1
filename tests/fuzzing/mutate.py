"""Inputs that differ in one value from one that is right: flipped bytes alone rarely get past a length or a checksum.

An input is msgpack or JSON; bytes in it that are msgpack themselves are changed inside. What does not live here:
changes of single bytes (atheris and hypothesis do that).
"""

from __future__ import annotations

import json
import math
import random
from typing import Any

import msgpack

NUMBERS = (0, 1, -1, 2, 63, 64, 255, 256, 1 << 16, 10**9, 10**9 + 1, 10**18, 10**18 + 1, (1 << 63) - 1, (1 << 64) - 1)
OTHERS: tuple[Any, ...] = (None, True, False, "", "text", b"", bytes(32), [], {}, 0.5, 1e308, math.nan, -math.inf)


def changed(data: bytes, draw: random.Random, *, is_json: bool = False) -> bytes | None:
    """`data` with one value changed; None if it has no values, or the change cannot be written."""
    try:
        values = json.loads(data) if is_json else msgpack.unpackb(data, strict_map_key=False)
    except Exception:  # noqa: BLE001 - then it is not what it should be, which is nothing new
        return None
    places = list(_places(values))
    if not places:
        return None
    container, key = draw.choice(places)
    value = container[key]
    inner = changed(value, draw) if isinstance(value, bytes) and draw.random() < 0.7 else None
    if inner is not None:
        container[key] = inner
    elif draw.random() < 0.2:
        _change_length(container, key, draw) if isinstance(container, list) else _turn(container)
    else:
        other, where = draw.choice(places)
        container[key] = _other(value, other[where], draw)
    try:
        return _json(values) if is_json else _spelt(bytes(msgpack.packb(values)), draw)
    except (ValueError, TypeError, OverflowError, RecursionError):  # such as a list that is now in itself
        return None


def _json(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


def _spelt(packed: bytes, draw: random.Random) -> bytes:
    """The same values, or nearly; now and then with a longer length than some bytes need."""
    at = packed.find(b"\xc4", draw.randrange(len(packed)))
    return packed if at < 0 or draw.random() < 0.95 else packed[:at] + b"\xc5\x00" + packed[at + 1 :]


def _turn(values: dict[Any, Any]) -> None:
    """Another order, as it is of the bytes."""
    items = list(values.items())[::-1]
    values.clear()
    values.update(items)


def _places(values: Any) -> Any:
    """(container, key) of everything in lists and dictionaries, however deep."""
    pairs = enumerate(values) if isinstance(values, list) else values.items() if isinstance(values, dict) else ()
    for key, value in pairs:
        yield values, key
        yield from _places(value)


def _change_length(values: list[Any], at: int, draw: random.Random) -> None:
    match draw.randrange(3):
        case 0:
            del values[at]
        case 1:
            values.insert(at, values[at])
        case _:
            values[at:] = values[at:] * draw.choice((0, 2, 3, 70))


def _other(value: Any, another: Any, draw: random.Random) -> Any:
    """Something else in the place of `value`; `another` is a value from elsewhere."""
    match draw.randrange(6):
        case 0:
            return another
        case 1:
            return draw.choice(OTHERS)
        case 2:
            return draw.choice(NUMBERS)
    if isinstance(value, bool | None):
        return not value
    if isinstance(value, int | float):
        return value + draw.choice((-1, 1))
    if isinstance(value, bytes | str) and value:
        return _bent(value, draw)
    return [value] * draw.choice((1, 2, 100))


def _bent(value: Any, draw: random.Random) -> Any:
    """Text or bytes with a piece cut out, or a bit of one byte flipped."""
    at = draw.randrange(len(value))
    if draw.random() < 0.4:
        return value[:at] + value[at + draw.choice((1, 2, 8)) :] * draw.choice((1, 1, 3))
    if isinstance(value, str):
        return value[:at] + chr(ord(value[at]) ^ 1 << draw.randrange(7)) + value[at + 1 :]
    return value[:at] + bytes([value[at] ^ 1 << draw.randrange(8)]) + value[at + 1 :]
