"""The entropy coding of positions: how many elements of a tensor are kept where, by what is known so far.

In updates of real models some rows or columns of a tensor move more than others. A tensor is therefore read along its
rows or down its columns, whichever tells more; such a row or column is a "line" here, and 64 elements of it, its part
of one tile, are a "cell". Positions are coded in two steps:

1. How many elements each cell has, the first cells of all lines, then all second ones, and so on. What a line had so
   far says how many come next: its rate is taken for Gamma-distributed, so the next count is negative binomial
   (a Gamma-Poisson mixture). How much lines differ is the shape of that Gamma distribution, one of eight for each
   tensor. The last cell of a tile is not coded, as it holds what the others leave of the tile's elements.
2. Which elements of the cell these are: their number among all choices of as many (the combinatorial number system),
   all of which are equally likely.

Bits an index, of 7.36 that random positions need at least: 7.41 where they are random; 6.11 to 7.02 in six rounds of 30
steps of a llama with 0.76 M parameters (batch 8), 6.42 to 6.59 in five of one with 5.1 M (batch 2). One Golomb code for
each tensor, the best of 48, takes 7.49, 6.77 to 7.35 and 7.14 to 7.24.

Numbers become bits in the range coder of `constriction` (arXiv 2201.01741). Its probabilities, float32 in the end, come
from multiplications, divisions and running sums in a fixed order, which IEEE 754 makes the same on every machine; only
the choice of a code does not, and no decoder makes it. What does not live here: which elements are kept (`tiles`), and
their values (`sparse`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from p2pllm.averaging.tiles import SIDE, Grid, Ints

Words = NDArray[np.uint64]

CODES = 16
"""Ways to code a tensor's positions: code % 8 says the shape, 2 ** (code % 8 - 3); from 8 on lines are columns."""

_DOWN = 8

_MANY = 16
"""Counts from 16 to 64 share one symbol; which of them it is follows, all equally likely."""

_CHOICES: Words = np.array([[math.comb(n, k) for k in range(SIDE + 1)] for n in range(SIDE + 1)], np.uint64)
"""[n, k]: ways to choose k of n; the most are 1.8e18."""

_COUNTS = constriction.stream.model.Categorical(perfect=False)
_RESTS = constriction.stream.model.Uniform(SIDE - _MANY + 1)
_NUMBERS = constriction.stream.model.Uniform()
_ONE = np.uint64(1)
_BITS = 16  # of a number at a time: the coder's probabilities have 24, and what it rounds shall not matter


class _Lines:
    """A tensor's rows, or its columns, cut into cells. A "place" is an index into the lines, one after another."""

    def __init__(self, grid: Grid, down: bool) -> None:
        self.count, self.length = (grid.cols, grid.rows) if down else (grid.rows, grid.cols)
        self.kept = grid.kept.T if down else grid.kept  # (bands of 64 lines, cells of a line)
        self.cells = self.kept.shape[1]
        self.widths = np.minimum(SIDE, self.length - SIDE * np.arange(self.cells))
        numbers = np.arange(self.count)
        self.coded = (numbers % SIDE != SIDE - 1) & (numbers != self.count - 1)
        """Of each line, whether its counts are coded."""
        self.expected = self.widths * (grid.count / (self.count * self.length))
        """Of each cell of a line, how many elements it has on average."""


def choose(grid: Grid, positions: Ints) -> int:
    """The code that takes the fewest bits, as far as the totals of lines tell.

    positions: as `Grid.select` gives them.
    """
    costs = []
    for down in (False, True):
        lines = _Lines(grid, down)
        line = positions % grid.cols if down else positions // grid.cols
        totals = np.bincount(np.bincount(line, minlength=lines.count))
        costs += _costs(lines, totals, grid.count / lines.count)
    return int(np.argmin(costs))


def _costs(lines: _Lines, totals: Ints, mean: float) -> list[float]:
    """Bits with each shape, where so many lines have 0, 1, 2, ... elements, about `mean` of them."""
    number, steps = np.arange(len(totals)), np.arange(len(totals) - 1)
    factorials = _products(1 + steps)
    choices = _products(lines.length - steps) - factorials  # of so many elements in a line
    coded = np.count_nonzero(lines.coded) / lines.count
    costs = []
    for code in range(_DOWN):
        shape = _shape(code)
        chance = mean / (shape + mean)
        ways = _products(shape + steps) - factorials
        bits = -ways - shape * math.log2(1 - chance) - number * math.log2(chance)
        costs.append(float(totals @ (coded * bits + choices)))
    return costs


def _products(factors: NDArray[Any]) -> NDArray[np.float64]:
    """log2 of the product of the first 0, 1, 2, ... factors."""
    return np.concatenate([[0.0], np.cumsum(np.log2(factors))])


def _shape(code: int) -> float:
    return float(2.0 ** (code % _DOWN - 3))


def encode(coder: Any, grid: Grid, code: int, positions: Ints) -> None:
    """Put the positions of a tensor, ascending, into a RangeEncoder."""
    lines = _Lines(grid, code >= _DOWN)
    places = positions
    if code >= _DOWN:
        row, col = np.divmod(positions, grid.cols)
        places = np.sort(col * grid.rows + row)
    line, inside = np.divmod(places, lines.length)
    cells = line * lines.cells + (inside // SIDE)
    counts = np.bincount(cells, minlength=lines.count * lines.cells).reshape(lines.count, lines.cells)
    _encode_counts(coder, lines, _shape(code), counts[lines.coded])
    used = np.flatnonzero(counts)
    sizes = counts.reshape(-1)[used]
    ends = np.cumsum(sizes)
    order = np.arange(len(places)) - np.repeat(ends - sizes, sizes)  # of each element in its cell
    # sums that overflow are right all the same once they are taken from each other
    sums = np.cumsum(_CHOICES[inside % SIDE, order + 1])
    numbers = np.diff(sums[ends - 1], prepend=np.uint64(0))
    _encode_numbers(coder, numbers, _CHOICES[lines.widths[used % lines.cells], sizes])


def decode(coder: Any, grid: Grid, code: int) -> Ints:
    """The positions of a tensor, ascending, from a RangeDecoder.

    Raises ValueError if a cell would hold what it cannot, AssertionError as the coder does.
    """
    lines = _Lines(grid, code >= _DOWN)
    counts = np.zeros((lines.count, lines.cells), np.int64)
    counts[lines.coded] = _decode_counts(coder, lines, _shape(code))
    counts[~lines.coded] = lines.kept - np.add.reduceat(counts, np.arange(0, lines.count, SIDE), axis=0)
    if ((counts < 0) | (counts > lines.widths)).any():
        raise ValueError("A sparse update keeps another number of elements in a tile than its layout demands.")
    used = np.flatnonzero(counts)
    sizes = counts.reshape(-1)[used]
    limits = _CHOICES[lines.widths[used % lines.cells], sizes]
    numbers = _decode_numbers(coder, limits)
    if (numbers >= limits).any():
        raise ValueError("A sparse update has an index outside of its tile.")
    line, cell = np.divmod(np.repeat(used, sizes), lines.cells)
    places: Ints = line * lines.length + cell * SIDE + _chosen(numbers, sizes)
    if code < _DOWN:
        return places
    col, row = np.divmod(places, grid.rows)
    positions: Ints = np.sort(row * grid.cols + col)
    return positions


def _chosen(numbers: Words, sizes: Ints) -> Ints:
    """Elements of each cell, ascending, from their number among all choices of as many."""
    first = np.cumsum(sizes) - sizes
    order = np.argsort(-sizes, kind="stable")
    sizes, first, rest = sizes[order], first[order], numbers[order]
    found = np.empty(int(sizes.sum()), np.int64)
    for size in range(int(sizes.max(initial=0)), 0, -1):
        some = int(np.count_nonzero(sizes >= size))
        # the largest element is the last one below which so many can be chosen in no more ways than that
        largest = np.searchsorted(_CHOICES[:SIDE, size], rest[:some], "right") - 1
        found[first[:some] + size - 1] = largest
        rest[:some] -= _CHOICES[largest, size]
    return found


def _encode_counts(coder: Any, lines: _Lines, shape: float, counts: Ints) -> None:
    had, before = np.zeros(len(counts), np.int64), 0.0
    for each, expected in zip(counts.T, lines.expected, strict=True) if len(counts) else ():
        coder.encode(np.minimum(each, _MANY).astype(np.int32), _COUNTS, _chances(had, shape, before, expected))
        coder.encode((each[each >= _MANY] - _MANY).astype(np.int32), _RESTS)
        had, before = had + each, before + expected


def _decode_counts(coder: Any, lines: _Lines, shape: float) -> Ints:
    had, before = np.zeros(np.count_nonzero(lines.coded), np.int64), 0.0
    counts = np.zeros((len(had), lines.cells), np.int64)
    for cell, expected in enumerate(lines.expected) if len(had) else ():
        each = counts[:, cell]
        each[:] = coder.decode(_COUNTS, _chances(had, shape, before, expected))
        many = each >= _MANY
        each[many] += coder.decode(_RESTS, np.count_nonzero(many))
        had, before = had + each, before + expected
    return counts


def _chances(had: Ints, shape: float, before: float, expected: float) -> NDArray[np.float32]:
    """Of counts 0 to 15 and of all above, for each line by what it had so far; (lines, 17).

    had: of which `before` were to be expected. It is rounded down to its five highest bits, so that there are few
    different ones to work on; how many depends on no line's length.
    """
    spare = np.maximum(np.frexp(had.astype(np.float64))[1] - 5, 0)
    keys = spare * 32 + (had >> spare)
    there = np.flatnonzero(np.bincount(keys))
    known = there % 32 << there // 32
    step = np.arange(SIDE)
    ratios = np.ones((len(known), SIDE + 1))
    # the probability of one more, as a multiple
    ratios[:, 1:] = (shape + known[:, None] + step) / (step + 1) * (expected / (shape + before + expected))
    chances = np.cumprod(ratios, axis=1)
    sums = np.cumsum(chances, axis=1)
    table = np.empty((len(known), _MANY + 1), np.float32)
    table[:, :_MANY] = chances[:, :_MANY] / sums[:, -1:]
    table[:, _MANY] = (sums[:, -1] - sums[:, _MANY - 1]) / sums[:, -1]
    rows = np.zeros(int(there[-1]) + 1, np.int64)
    rows[there] = np.arange(len(there))
    chosen: NDArray[np.float32] = table[rows[keys]]
    return chosen


def _encode_numbers(coder: Any, numbers: Words, limits: Words) -> None:
    """Numbers from 0 to below their limits, all equally likely: their highest bits, then 16 and 16 of the others.

    Only the highest are coded with regard to the limit, so a decoder may find a number that reaches it.
    """
    low, tops = _highest(limits)
    some = tops > 1
    coder.encode((numbers >> low)[some].astype(np.int32), _NUMBERS, tops[some])
    for shift, some, sizes in _others(low):
        coder.encode((numbers[some] >> shift & sizes - _ONE).astype(np.int32), _NUMBERS, sizes.astype(np.int32))


def _decode_numbers(coder: Any, limits: Words) -> Words:
    low, tops = _highest(limits)
    some = tops > 1
    numbers = np.zeros(len(limits), np.uint64)
    numbers[some] = coder.decode(_NUMBERS, tops[some])
    numbers <<= low
    for shift, some, sizes in _others(low):
        numbers[some] |= coder.decode(_NUMBERS, sizes.astype(np.int32)).astype(np.uint64) << shift
    return numbers


def _highest(limits: Words) -> tuple[Words, NDArray[np.int32]]:
    """How many bits of each number are not among its highest, and what these are below."""
    length = np.frexp((limits - _ONE).astype(np.float64))[1]  # as bit_length, for all that _CHOICES holds
    low = np.maximum(length - _BITS, 0).astype(np.uint64)
    return low, ((limits - _ONE >> low) + _ONE).astype(np.int32)


def _others(low: Words) -> Iterator[tuple[np.uint64, NDArray[np.bool_], Words]]:
    """Where 16 bits begin, which numbers have some there, and what these are below."""
    for shift in range(0, int(low.max(initial=0)), _BITS):
        some = low > shift
        yield np.uint64(shift), some, _ONE << np.minimum(low[some] - np.uint64(shift), np.uint64(_BITS))
