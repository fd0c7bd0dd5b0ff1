"""Codecs: how float32 values travel.

A codec maps each value alone, so a decoded value is the same wherever a vector is cut. Everything is little
endian on the wire. What does not live here: checks of finiteness and framing; the all-reduce does both.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_FP16_MAX = np.float32(np.finfo(np.float16).max)


class Codec(Protocol):
    """float32 values to bytes and back; the size on the wire depends on the count alone."""

    name: str
    """What a manifest calls it."""

    direct: bool
    """True where the bytes on the wire are those of a float32 array here, so a socket may fill an array."""

    def bytes_for(self, count: int) -> int:
        """Bytes that `count` values take on the wire."""
        ...

    def encode(self, values: Floats) -> memoryview:
        """The bytes of `values`, float32 (count,), contiguous; they may share its memory."""
        ...

    def decode(self, data: bytes | bytearray | memoryview, out: Floats) -> None:
        """Write the values of `data` to `out`, float32 (count,), contiguous; it may be what `data` shares.

        Raises ValueError unless `data` has exactly `bytes_for(count)` bytes.
        """
        ...


class Fp32:
    """The values themselves: 4 bytes each, exact."""

    name = "fp32"
    direct = sys.byteorder == "little"

    def bytes_for(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Floats) -> memoryview:
        # On a little-endian machine astype(copy=False) is the array itself and nothing is copied.
        return _bytes(values.astype("<f4", copy=False))

    def decode(self, data: bytes | bytearray | memoryview, out: Floats) -> None:
        _check_length(self, data, out.size)
        out[:] = np.frombuffer(data, "<f4")


class Fp16:
    """IEEE half precision: 2 bytes each, rounded to nearest even; beyond ±65504 the largest finite value."""

    name = "fp16"
    direct = False

    def bytes_for(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Floats) -> memoryview:
        # torch converts with the CPU's vector instructions, 20 times as fast as numpy; both round alike.
        import torch

        clipped = np.clip(values, -_FP16_MAX, _FP16_MAX)
        return _bytes(torch.from_numpy(clipped).half().numpy().astype("<f2", copy=False))

    def decode(self, data: bytes | bytearray | memoryview, out: Floats) -> None:
        import torch

        _check_length(self, data, out.size)
        half = np.frombuffer(data, "<f2").astype(np.float16, copy=False)
        # torch knows no read-only memory and warns of it
        torch.from_numpy(out).copy_(torch.from_numpy(half if half.flags.writeable else half.copy()))


_CODECS: dict[str, Codec] = {known.name: known for known in (Fp32(), Fp16())}


def codec(name: str) -> Codec:
    """The codec that a manifest calls `name`. Raises ValueError if there is none."""
    try:
        return _CODECS[name]
    except KeyError:
        raise ValueError(f'There is no codec "{name}"; known are {", ".join(sorted(_CODECS))}.') from None


def _bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array; an empty one is spelled out, because memoryview cannot cast it."""
    return array.data.cast("B") if array.size else memoryview(b"")


def _check_length(used: Codec, data: bytes | bytearray | memoryview, count: int) -> None:
    if len(data) != used.bytes_for(count):
        raise ValueError(f"{count} {used.name} values take {used.bytes_for(count)} bytes, but {len(data)} came.")
