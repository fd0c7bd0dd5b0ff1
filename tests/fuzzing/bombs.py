"""Short bytes that ask for much: repeated to the length of an input, they are made to cost time or memory."""

from __future__ import annotations

from fuzzing.promise import Target

BOMBS: dict[str, bytes] = {
    "lists in lists": b"\x91",
    "lists of 500 in lists": b"\xdc\x01\xf4",  # a length beyond that of the whole input would be refused at once
    "long lists in lists": b"\xdc\xff\xff",
    "longer lists in lists": b"\xdd\x00\x01\x00\x00",
    "endless lists in lists": b"\xdd\xff\xff\xff\xff",
    "maps in maps": b"\x81\xa1k",
    "long maps in maps": b"\xde\xff\xff\xa1k",
    "endless maps in maps": b"\xdf\xff\xff\xff\xff\xa1k",
    "maps with lists for keys": b"\x81\x90",
    "endless text": b"\xdb\xff\xff\xff\xff",
    "endless bytes": b"\xc6\xff\xff\xff\xff",
    "endless extensions": b"\xc9\xff\xff\xff\xff\x01",
    "times": b"\xdc\xff\xff" + b"\xd6\xff\xff\xff\xff\xff" * 8,
    "times that cannot be": b"\xd7\xff" + b"\xff" * 8,
    "long times": b"\xc7\x0c\xff" + b"\xff" * 12,
    "no msgpack": b"\xc1",
    "JSON lists in lists": b"[",
    "JSON maps in maps": b'{"model":',
    "JSON digits": b"9",
    "JSON escapes": b'{"\\ud800":1e999,',
    "text of an invite": b"p2pllm:" + b"a" * 4000,
    "frames that never end": b"\xf5p2L\x01\x00\x00\x5f\xff",
    "frames of nothing": b"\xf5p2L\x01\x00\x00\x00\x00",
}


def loaded(bomb: bytes, target: Target) -> list[bytes]:
    """Long inputs of a target that consist of it: alone, and where something else should follow.

    The longest one may be refused for its length alone, so there are some of half of it.
    """
    load, seed = bomb * (target.max_bytes // len(bomb) + 1), target.seeds()[0]
    starts = [seed[:at] for at in (0, 1, len(seed) // 2)]
    return [(start + load)[:size] for start in starts for size in (target.max_bytes // 2, target.max_bytes)]
