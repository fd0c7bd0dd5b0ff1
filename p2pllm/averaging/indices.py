"""The entropy coding of positions: gaps between kept elements as a prefix in unary and a suffix in plain bits.

Two families of codes, each with a parameter b. In Golomb-Rice codes all suffixes have b bits, and the prefix counts
what does not fit in: best where positions are random. In exponential Golomb codes prefix p says that the suffix has
b + p bits, so few long gaps among many short ones are cheap: best where kept elements stand close together, as they
do in updates of real models. Either counts along the rows or down the columns of a tile. Each tensor uses what is
shortest for it, of equals the first, so there is one right choice.

Bits an index, of 7.36 that random positions need at least:

    positions                             Golomb-Rice   exp-Golomb   the shortest for each tensor
    random                                       7.50         7.68                           7.50
    llama, 0.76 M, rounds of 30 steps       7.45-7.50    6.58-6.98                      6.58-6.98

Prefixes coded with no loss at all would save another 3 % on the latter, at many times the work. All prefixes stand
together, and so do all lowest suffix bits, all second lowest and so on: NumPy then codes a whole model without a loop
over indices. What does not live here: which elements are kept, and where (`tiles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from p2pllm.averaging.tiles import AREA, Grid, Ints

Number = TypeVar("Number", bound=np.generic)

Bits = NDArray[np.uint8]
"""One bit an element, 0 or 1."""

_PARAMETERS = 12
_CODES = [(grows, parameter) for grows in (False, True) for parameter in range(_PARAMETERS)]
"""(whether the suffix grows with the prefix, its bits at prefix 0)."""

_DOWN = 128
"""Added to the number of a code where gaps count down the columns."""


def _prefixes(grows: bool, parameter: int) -> Ints:
    """The prefix of each gap from 0 to 4095."""
    quotient = np.arange(AREA) >> parameter
    # frexp gives the bit length, exactly
    return np.frexp(quotient + 1.0)[1].astype(np.int64) - 1 if grows else quotient


_PREFIXES = np.stack([_prefixes(*code) for code in _CODES])
_COSTS = np.stack([each + 1 + b + grows * each for (grows, b), each in zip(_CODES, _PREFIXES, strict=True)])
"""Bits of each gap in each code."""


def encode(grids: Sequence[Grid], positions: Sequence[Ints]) -> tuple[bytes, Bits, Bits]:
    """The code of each tensor, one byte each; the prefixes; and the suffixes, of the positions in each tensor."""
    codes, prefixes, suffixes, widths = bytearray(), [], [], []
    for grid, where in zip(grids, positions, strict=True):
        choices = grid.gaps(where)
        costs = np.concatenate([_bits(np.bincount(gaps)) for gaps in choices])
        down, number = divmod(int(costs.argmin()), len(_CODES))
        prefix = _PREFIXES[number][choices[down]]
        base, width = _spread(number, prefix)
        codes.append(number + _DOWN * down)
        prefixes.append(prefix)
        suffixes.append((choices[down] - base).astype(np.uint16))
        widths.append(width)
    return (
        bytes(codes),
        _unary(joined(prefixes, np.int64)),
        _planes(joined(suffixes, np.uint16), joined(widths, np.uint8)),
    )


def _bits(counts: Ints) -> Ints:
    """What each code takes for so many gaps of each size. The largest is far below 4095, so few columns are read."""
    bits: Ints = _COSTS[:, : len(counts)] @ counts
    return bits


def worst_bits(grids: Sequence[Grid]) -> int:
    """The most bits that prefixes and suffixes of these tensors can take together.

    It is what one Golomb-Rice code would take at worst, whose parameter fits the density; the best takes no more.
    """
    total = 0
    for grid in grids:
        parameter = min((AREA // grid.keep).bit_length() - 1, _PARAMETERS - 1)
        total += grid.count * (parameter + 1) + int(((grid.areas - grid.kept) >> parameter).sum())
    return total


def decode_prefixes(bits: Bits, count: int) -> Ints:
    """The prefixes of `count` indices, which must fill `bits` exactly. Raises ValueError if they do not."""
    ones = np.flatnonzero(bits)
    if len(ones) != count or (len(bits) - 1 if count else 0) != (ones[-1] if count else len(bits)):
        raise ValueError(f"The indices of a sparse update are not {count}, as its layout demands.")
    return np.diff(ones, prepend=-1) - 1


def decode(grids: Sequence[Grid], codes: bytes, prefixes: Ints, bits: Bits) -> list[Ints]:
    """The positions in each tensor, ascending, from the output of `encode`.

    bits: the suffixes, and up to 7 more, which are not read. Raises ValueError for a code that does not exist, an
    index outside of its tile, or another number of bits.
    """
    bases, widths, ends = [], [], np.cumsum([grid.count for grid in grids])
    for grid, code, end in zip(grids, codes, ends, strict=True):
        number, prefix = code % _DOWN, prefixes[end - grid.count : end]
        if number >= len(_CODES):
            raise ValueError(f"A sparse update uses the unknown index code {code}.")
        if prefix.max() > _PREFIXES[number][-1]:
            raise ValueError("A sparse update has an index outside of its tile.")
        base, width = _spread(number, prefix)
        bases.append(base)
        widths.append(width)
    gaps = joined(bases, np.int64) + _suffixes(bits, joined(widths, np.uint8))
    return [
        grid.positions(gaps[end - grid.count : end], down=code >= _DOWN)
        for grid, code, end in zip(grids, codes, ends, strict=True)
    ]


def _spread(number: int, prefix: Ints) -> tuple[Ints, NDArray[np.uint8]]:
    """The smallest gap with each prefix in a code, and the bits of its suffix."""
    grows, parameter = _CODES[number]
    if grows:
        return ((1 << prefix) - 1) << parameter, (prefix + parameter).astype(np.uint8)
    return prefix << parameter, np.full(len(prefix), parameter, np.uint8)


def joined(parts: Sequence[NDArray[Number]], dtype: type[Number]) -> NDArray[Number]:
    """np.concatenate, also of nothing."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _unary(prefixes: Ints) -> Bits:
    """As many zeros as the prefix says, then a one."""
    ends = np.cumsum(prefixes + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    bits[ends] = 1
    return bits


def _planes(suffixes: NDArray[np.uint16], widths: NDArray[np.uint8]) -> Bits:
    """The lowest bit of all suffixes that have one, the second lowest of those that have two, and so on."""
    planes = []
    for place in range(int(widths.max(initial=0))):
        planes.append((suffixes[widths > place] >> place & 1).astype(np.uint8))
    return joined(planes, np.uint8)


def _suffixes(bits: Bits, widths: NDArray[np.uint8]) -> Ints:
    """The reverse of `_planes`."""
    needed = int(widths.sum(dtype=np.int64))
    if needed + 7 < len(bits) or needed > len(bits):
        raise ValueError(f"A sparse update ends with {len(bits)} bits of indices instead of {needed}.")
    suffixes = np.zeros(len(widths), np.int64)
    at = 0
    for place in range(int(widths.max(initial=0))):
        wide = widths > place
        taken = bits[at : at + int(np.count_nonzero(wide))]
        suffixes[wide] |= taken.astype(np.int64) << place
        at += len(taken)
    return suffixes
