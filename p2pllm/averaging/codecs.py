"""Codecs: how float32 values travel.

A decoded value is the same wherever a vector is cut at a multiple of BLOCK elements: codecs map each value alone, or
those of a block together. Everything is little endian on the wire. What does not live here: checks of finiteness and
framing; the all-reduce does both.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

BLOCK = 64
"""Elements that a codec may treat together. Spans and parts of a vector start at multiples of it."""

_FP16_MAX = np.float32(np.finfo(np.float16).max)
_BF16_MAX = np.float32(float.fromhex("0x1.fep127"))
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 of it are finite


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
        torch.from_numpy(out).copy_(torch.from_numpy(_writable(half)))


class Bf16:
    """bfloat16: 2 bytes each, rounded to nearest even: the range of float32, to within 3.39e38, and 8 bits."""

    name = "bf16"
    direct = False

    def bytes_for(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Floats) -> memoryview:
        import torch

        clipped = np.clip(values, -_BF16_MAX, _BF16_MAX)
        return _bytes(torch.from_numpy(clipped).bfloat16().view(torch.int16).numpy().astype("<i2", copy=False))

    def decode(self, data: bytes | bytearray | memoryview, out: Floats) -> None:
        import torch

        _check_length(self, data, out.size)
        half = np.frombuffer(data, "<i2").astype(np.int16, copy=False)
        torch.from_numpy(out).copy_(torch.from_numpy(_writable(half)).view(torch.bfloat16))


class Int8:
    """A byte each, and a float32 scale for each BLOCK of them: the block's largest magnitude is 127 times its scale.

    All scales come first. A value is the product of two float32 numbers, so it is the same on any machine.
    """

    name = "int8"
    direct = False

    def bytes_for(self, count: int) -> int:
        return count + 4 * -(-count // BLOCK)

    def encode(self, values: Floats) -> memoryview:
        blocks = -(-values.size // BLOCK)
        padded = np.zeros(blocks * BLOCK, np.float32)
        padded[: values.size] = values
        rows = padded.reshape(blocks, BLOCK)
        scales = np.minimum(np.abs(rows).max(axis=1, initial=0.0) / np.float32(127), _LARGEST_SCALE)
        np.divide(rows, np.where(scales > 0, scales, 1)[:, None], out=rows)
        steps = np.clip(np.rint(rows, out=rows), -127, 127).astype(np.int8).reshape(-1)[: values.size]
        return memoryview(scales.astype("<f4").tobytes() + steps.tobytes())

    def decode(self, data: bytes | bytearray | memoryview, out: Floats) -> None:
        _check_length(self, data, out.size)
        blocks = -(-out.size // BLOCK)
        scales = np.frombuffer(data, "<f4", blocks)
        steps = np.frombuffer(data, np.int8, offset=4 * blocks)
        with np.errstate(over="ignore"):  # the all-reduce looks whether all is finite
            np.multiply(steps, np.repeat(scales, BLOCK)[: out.size], out=out, casting="unsafe")


_CODECS: dict[str, Codec] = {known.name: known for known in (Fp32(), Fp16(), Bf16(), Int8())}


def codec(name: str) -> Codec:
    """The codec that a manifest calls `name`. Raises ValueError if there is none."""
    try:
        return _CODECS[name]
    except KeyError:
        raise ValueError(f'There is no codec "{name}"; known are {", ".join(sorted(_CODECS))}.') from None


def _bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array; an empty one is spelled out, because memoryview cannot cast it."""
    return array.data.cast("B") if array.size else memoryview(b"")


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """torch knows no read-only memory and warns of it."""
    return array if array.flags.writeable else array.copy()


def _check_length(used: Codec, data: bytes | bytearray | memoryview, count: int) -> None:
    if len(data) != used.bytes_for(count):
        raise ValueError(f"{count} {used.name} values take {used.bytes_for(count)} bytes, but {len(data)} came.")
