"""Outer optimizers: steps of the shared state that give the same bits on any hardware.

Every peer applies a step for itself and the digests of the results must agree, so:

- arrays see only IEEE-754 operations that are correctly rounded and element-wise (+ - * / sqrt), one at a
  time, each with its own result in memory: nothing that a compiler or BLAS could fuse or reorder;
- scalars are float64, from + - * / sqrt alone, and are rounded to float32 once, explicitly;
- the one sum, that of the update's norm, is a tree whose shape depends on nothing but the vector's length.

`OuterOptimizer` has what all share, `adamw` and `nesterov` are the two that there are. What does not live here: where
updates come from (`training`) or how they are averaged (`averaging`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from p2pllm.errors import ArithmeticsError, StateError
from p2pllm.state.fragments import Span, span_of
from p2pllm.state.layout import FLOAT, Layout
from p2pllm.state.shared import SharedState

BLOCK = 1 << 15
"""Elements worked on at once: nine arrays of this many float32 fit a core's own cache."""

_SUM_BLOCK = 1 << 15
"""Leaves of one tree of the norm. Part of the result, unlike BLOCK: another value gives other bits."""

_MAX_NORM = 1e18
"""What an update is clipped to if the manifest does not clip: its square must fit float32, or one member could
stop the run with a single huge number."""

SMALLEST = float(np.finfo(np.float32).tiny)
"""The smallest number that float32 holds in full; what is rounded below it may be 0."""

_CLIP_GUARD = 1e-6  # as torch.nn.utils.clip_grad_norm_

Scalars = Mapping[str, np.float32]


def falling(peak: float, final_fraction: float, warmup: int, rounds: int, round: int) -> float:  # noqa: A002 - the word
    """A rate that changes with the round: that of the step from state `round` to `round + 1` of `rounds`.

    It rises linearly over the first `warmup` rounds, is at its peak in the next one, and falls linearly to
    `final_fraction` of the peak in the last round; later rounds, if any, keep that.
    """
    if round < warmup:
        return peak * (round + 1) / (warmup + 1)
    last = rounds - 1 - warmup
    progress = min(1.0, (round - warmup) / last) if last > 0 else 0.0
    return peak * (1.0 - progress * (1.0 - final_fraction))


class OuterOptimizer(ABC):
    """Moves a state by one averaged update; see the module for why every peer comes to the same bits."""

    moments: ClassVar[tuple[str, ...]]
    """Names of the vectors that it keeps beside the parameters."""

    clip_norm: float = 0.0
    """Largest L2 norm of an update; 0 clips only what would overflow."""

    def __init__(self, layout: Layout, block: int = BLOCK, fragments: int = 1) -> None:
        """layout: of the states, with our moments. block: elements worked on at once, which changes speed only.

        fragments: parts of the parameters that are moved in turn, one a step.
        """
        if layout.moments != self.moments:
            raise StateError(f"This outer optimizer keeps {self.moments}, but the layout has {layout.moments}.")
        self._layout = layout
        self._pieces = list(_pieces(layout, block))
        self._fragments = fragments
        self._scratch = np.empty((2, block), FLOAT)

    @abstractmethod
    def scalars(self, round: int, clip: float) -> Scalars:  # noqa: A002 - the design's word
        """What `move` needs for the step from state `round`, each rounded once from float64.

        clip: factor in (0, 1] for the update.
        """

    @abstractmethod
    def move(
        self,
        source: Sequence[np.ndarray],
        target: Sequence[np.ndarray],
        update: np.ndarray,
        scalars: Scalars,
        scratch: np.ndarray,
        decayed: bool,
    ) -> None:
        """One block of the step: from the vectors of `source` (parameters, then moments) to those of `target`, which
        may be the same arrays. scratch: float32 (2, elements). decayed: it is a block of matrices.

        `out=` everywhere: each operation is one pass over arrays that stay in the cache.
        """

    def step(self, state: SharedState, update: np.ndarray, into: SharedState | None = None) -> None:
        """Apply one averaged update, float32 of shape (layout.size,); the round grows by 1.

        With fragments it is the update of the round's, `span_of`, and all else stays as it is. In place, or if `into`
        is given, a state of the same layout with arrays of its own: then all of the result goes there, whatever was in
        it, and `state` stays as it is. The bits are the same.

        Raises StateError, and changes nothing, if the update has another shape or type or is not
        finite, if `into` does not fit, or if this process computes small numbers as 0.
        """
        target = state if into is None else into
        if into is not None:
            self._check_apart(state, into)
        first, last = span = span_of(self._layout.size, self._fragments, state.round)
        scalars = self.scalars(state.round, self._clip_factor(state, update, span))
        sources, targets = state.vectors, target.vectors
        if into is not None:
            for vector, to in zip(sources, targets, strict=True):
                to[:first], to[last:] = vector[:first], vector[last:]
        for start, stop, decayed in self._pieces:
            part = slice(max(start, first), min(stop, last))
            if part.start >= part.stop:
                continue
            scratch = self._scratch[:, : part.stop - part.start]
            cut, into_cut = [vector[part] for vector in sources], [vector[part] for vector in targets]
            self.move(cut, into_cut, update[part.start - first : part.stop - first], scalars, scratch, decayed)
        target.round = state.round + 1

    def _check_apart(self, state: SharedState, into: SharedState) -> None:
        """Vectors that overlap would be overwritten before they are read."""
        if into.layout != self._layout:
            raise StateError("The outer optimizer was built for another layout than that of the state it writes to.")
        if any(np.may_share_memory(one, other) for one in state.vectors for other in into.vectors):
            raise StateError("The outer step was told to write to a state that shares memory with the one it reads.")

    def _clip_factor(self, state: SharedState, update: np.ndarray, span: Span) -> float:
        """Factor in (0, 1] that brings the update's norm to `clip_norm`; all checks happen here."""
        if state.layout != self._layout:
            raise StateError("The outer optimizer was built for another layout than the state's.")
        if update.dtype != FLOAT or update.shape != (span[1] - span[0],):
            raise StateError(
                f"The averaged update is {update.dtype} of shape {update.shape}, but must be "
                f"float32 of shape ({span[1] - span[0]},)."
            )
        _check_subnormals()
        norm = math.sqrt(sum_of_squares(update))
        if not math.isfinite(norm):
            raise StateError("The averaged update holds a number that is not finite.")
        return min(1.0, (self.clip_norm or _MAX_NORM) / (norm + _CLIP_GUARD))


def sum_of_squares(vector: np.ndarray) -> float:
    """Sum of the squares of a float32 vector in float64, with the same bits anywhere.

    Each block of 32768 squares, the last one filled up with zeros, is folded in half until one number is
    left; the blocks' sums are then folded in the same way. np.sum and np.dot promise no order.
    """
    blocks = -(-vector.size // _SUM_BLOCK)
    sums = np.zeros(1 << max(blocks - 1, 0).bit_length(), np.float64)
    squares = np.empty(_SUM_BLOCK, np.float64)
    for index in range(blocks):
        part = vector[index * _SUM_BLOCK : (index + 1) * _SUM_BLOCK]
        squares[: part.size] = part
        squares[part.size :] = 0.0
        np.multiply(squares, squares, out=squares)
        sums[index] = _fold(squares)
    return _fold(sums)


def _fold(values: np.ndarray) -> float:
    """Sum a vector, whose length is a power of two, in place by adding its upper half to its lower."""
    half = values.size // 2
    while half:
        np.add(values[:half], values[half : 2 * half], out=values[:half])
        half //= 2
    return float(values[0])


def _pieces(layout: Layout, block: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, decayed) of runs of at most `block` elements; only parameters of 2 or more axes decay."""
    start = stop = 0
    decayed = False
    for entry in layout.entries:
        if (len(entry.shape) >= 2) != decayed:
            yield from _cut(start, stop, decayed, block)
            start, decayed = entry.offset, not decayed
        stop = entry.offset + entry.size
    yield from _cut(start, stop, decayed, block)


def _cut(start: int, stop: int, decayed: bool, block: int) -> Iterator[tuple[int, int, bool]]:
    for at in range(start, stop, block):
        yield at, min(at + block, stop), decayed


def _check_subnormals() -> None:
    """Some libraries switch a thread to flush subnormal numbers to 0; its results would then differ."""
    small = np.full(16, SMALLEST, FLOAT)
    np.multiply(small, np.float32(0.5), out=small)
    np.multiply(small, np.float32(2.0), out=small)
    if not (small == np.float32(SMALLEST)).all():
        raise ArithmeticsError(
            "This process computes very small numbers as 0, so its state would differ from that of other "
            "peers; unset whatever turns on flush-to-zero (for example a library built with -ffast-math)."
        )
