"""Tiles: how a tensor is cut into pieces of 64 x 64, and which elements of each piece are kept.

How many are kept follows from the shape alone, so nobody has to be told. What does not live here: how positions and
values travel (`indices`, `sparse`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

SIDE = 64
AREA = SIDE * SIDE
_SHIFT = 6  # SIDE is 1 << _SHIFT

_BLOCK = 1 << 18
"""Elements looked at together: their magnitudes, 1 MB, stay in a core's own cache. Changes speed only."""

_MANY = 4
"""Candidates for each element to keep from which on ties are looked for. Changes speed only."""

_GROUP = 16
"""Rows whose maximum stands for them in the search for a threshold. Changes speed only."""


class Grid:
    """One tensor as a matrix (first axis x the rest; a vector is one row), cut into tiles from the upper left.

    Tiles at the right and lower edges may be smaller. Of a tile with n elements ceil(n * keep / 4096) are kept.
    "Positions" are indices into the flat tensor, C order.
    """

    def __init__(self, shape: tuple[int, ...], keep: int) -> None:
        """shape: with at least one element. keep: elements of a full tile that are kept, 1 to 4096."""
        self.rows = shape[0] if len(shape) > 1 else 1
        self.cols = math.prod(shape) // self.rows
        self.keep = keep
        heights = np.minimum(SIDE, self.rows - np.arange(0, self.rows, SIDE))
        widths = np.minimum(SIDE, self.cols - np.arange(0, self.cols, SIDE))
        self.kept: Ints = -(-heights[:, None] * widths * keep // AREA)
        """Of each tile how many elements are kept, at least 1; (tiles down, tiles across)."""
        self.count = int(self.kept.sum())
        """Kept in the whole tensor."""

    def select(self, tensor: Floats) -> Ints:
        """Positions of the largest magnitudes of each tile, ascending; of equal ones those that come first.

        tensor: float32, flat. Raises ValueError if it holds a number that is not finite.
        """
        matrix = tensor.reshape(self.rows, self.cols)
        found = []
        for top, bottom, left, right in self._blocks():
            rows, cols = _largest(matrix[top:bottom, left:right], self.keep)
            found.append((rows.astype(np.int64) + top) * self.cols + (cols + left))
        positions: Ints = np.concatenate(found)
        positions.sort()
        return positions

    def _blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Top, bottom, left and right of parts of whole tiles; either one row of tiles high, or of full tiles."""
        width = min(self.kept.shape[1] * SIDE, _BLOCK // min(self.rows, SIDE) // SIDE * SIDE)
        bands = max(1, _BLOCK // (SIDE * width))
        full = self.rows // SIDE * SIDE
        tops = [*range(0, full, bands * SIDE), full]
        for top, bottom in [*pairwise(tops), (full, self.rows)]:
            for left in range(0, self.cols, width) if bottom > top else ():
                yield top, bottom, left, min(left + width, self.cols)


def _largest(part: Floats, keep: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows and columns of the largest magnitudes of each tile of `part`, which has whole tiles only.

    Of every few rows the largest magnitude of each column is taken. The k-th largest of these in a tile cannot be
    above its k-th largest magnitude, and is hardly below, so few elements are left to sort.
    """
    height = min(len(part), SIDE)
    width = part.shape[1]
    group = min(_GROUP, 1 << (AREA // keep).bit_length() - 1)
    padded = (len(part) // height, -(-height // group) * group, -(-width // SIDE) * SIDE)
    # no magnitude is below 0, so what fills up the edges is never kept
    sizes = np.empty(padded, np.float32) if padded[1:] == (height, width) else np.full(padded, -1, np.float32)
    np.abs(part.reshape(len(part) // height, height, width), out=sizes[:, :height, :width])
    kept = -(-height * np.minimum(SIDE, width - np.arange(0, width, SIDE)) * keep // AREA)
    floors = _floors(sizes, group, kept)
    mask = sizes >= np.repeat(floors, SIDE, axis=1)[:, None, :]
    if np.count_nonzero(mask) > _MANY * len(floors) * int(kept.sum()):
        mask = _without_ties(sizes, floors, kept)
    at = _nonzero(mask).astype(np.int32)
    row = at // padded[2]
    col = at - row * padded[2]
    tile = (row >> _SHIFT) * len(kept) + (col >> _SHIFT)
    # one key orders by tile, then from large to small, then by place; the bits of positive floats order as they do
    keys = (tile.astype(np.int64) << 31) + (0x7FFFFFFF - sizes.reshape(-1)[at].view(np.int32))
    keys = keys << 12 | ((row & SIDE - 1) << _SHIFT | (col & SIDE - 1))
    candidates = np.bincount(tile, minlength=floors.size)
    last = np.sort(keys)[np.cumsum(candidates) - candidates + np.tile(kept, len(floors)) - 1]
    chosen = np.flatnonzero(keys <= last[tile])
    return row[chosen], col[chosen]


def _floors(sizes: Floats, group: int, kept: Ints) -> Floats:
    """For each tile a bound that at least as many magnitudes reach as are kept; shape (bands, tiles across)."""
    bands, height, width = sizes.shape
    across = width // SIDE
    maxima = sizes.reshape(bands, height // group, group, width).max(axis=2)
    if not np.isfinite(maxima).all():
        raise ValueError("A vector to be compressed holds a number that is not finite.")
    maxima = maxima.reshape(bands, height // group, across, SIDE).swapaxes(1, 2).reshape(bands, across, -1)
    ranks = maxima.shape[2] - kept
    maxima.partition(np.unique(ranks), axis=2)
    floors: Floats = maxima[:, np.arange(across), ranks]
    return floors


def _without_ties(sizes: Floats, floors: Floats, kept: Ints) -> NDArray[np.bool_]:
    """Where sizes are above their tile's floor, or equal it and come early enough in the tile to be kept.

    Without it, tiles of zeros or of steps of equal size would leave all their elements to be sorted.
    """
    bands, height, width = sizes.shape
    by_tile = sizes.reshape(bands, height, -1, SIDE).swapaxes(1, 2).reshape(bands, width // SIDE, -1)
    ties = by_tile == floors[:, :, None]
    mask = np.cumsum(ties, axis=2, dtype=np.int16) <= kept[:, None]
    mask &= ties
    mask |= by_tile > floors[:, :, None]
    return mask.reshape(bands, -1, height, SIDE).swapaxes(1, 2).reshape(sizes.shape)


def _nonzero(mask: NDArray[np.bool_]) -> Ints:
    """np.flatnonzero of a mask with few ones, a multiple of 8 long, at twice the speed: by words first."""
    words = mask.reshape(-1).view(np.uint64)
    hits = np.flatnonzero(words != 0)
    inner = np.flatnonzero(words[hits].view(np.bool_))
    at: Ints = (hits[inner >> 3] << 3) + (inner & 7)
    return at
