"""The outer optimizer of `sync`: AdamW (arXiv 1711.05101) that gives the same bits on any hardware.

Every peer applies this step for itself and the digests of the results must agree, so:

- arrays see only IEEE-754 operations that are correctly rounded and element-wise (+ - * / sqrt), one at a
  time, each with its own result in memory: nothing that a compiler or BLAS could fuse or reorder;
- scalars are float64, from + - * / sqrt alone, and are rounded to float32 once, explicitly;
- the one sum, that of the gradient's norm, is a tree whose shape depends on nothing but the vector's length.

What does not live here: where gradients come from (`training.inner`) or how they are averaged (`averaging`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from p2pllm.errors import StateError
from p2pllm.manifest import OptimizerSection
from p2pllm.state.layout import FLOAT, Layout
from p2pllm.state.shared import SharedState

_BLOCK = 1 << 15
"""Elements worked on at once: nine arrays of this many float32 fit a core's own cache."""

_SUM_BLOCK = 1 << 15
"""Leaves of one tree of the norm. Part of the result, unlike _BLOCK: another value gives other bits."""

_MAX_NORM = 1e18
"""What a gradient is clipped to if the manifest does not clip: its square must fit float32, or one member could
stop the run with a single huge number."""

_KNOWN_DIGEST = "c63c1801bc3d2b3d117b98aaf0ff155b625433627b0453b32643ec20f74ddde1"
"""Of the state after the steps of `check_arithmetic`."""

_Vectors = tuple[np.ndarray, np.ndarray, np.ndarray]  # params, m, v

_SMALLEST = float(np.finfo(np.float32).tiny)
_CLIP_GUARD = 1e-6  # as torch.nn.utils.clip_grad_norm_


def learning_rate(section: OptimizerSection, rounds: int, round: int) -> float:  # noqa: A002 - the design's word
    """Learning rate of the step from state `round` to `round + 1` in a run of `rounds` rounds.

    It rises linearly over the first `warmup_rounds` rounds, is at its peak in the next one, and falls
    linearly to `final_fraction` of the peak in the last round; later rounds, if any, keep that.
    """
    if round < section.warmup_rounds:
        return section.learning_rate * (round + 1) / (section.warmup_rounds + 1)
    falling = rounds - 1 - section.warmup_rounds
    progress = min(1.0, (round - section.warmup_rounds) / falling) if falling > 0 else 0.0
    return section.learning_rate * (1.0 - progress * (1.0 - section.final_fraction))


class AdamW:
    """AdamW with clipping by norm, decoupled decay of the matrices, and a schedule.

    Vectors (biases, the gains of norms) are not decayed, as is usual for language models. The step is that of
    torch.optim.AdamW up to rounding.
    """

    def __init__(self, section: OptimizerSection, rounds: int, layout: Layout, block: int = _BLOCK) -> None:
        """rounds: of the whole run. block: elements worked on at once, which changes speed only."""
        self._section = section
        self._rounds = rounds
        self._layout = layout
        self._pieces = list(_pieces(layout, block))
        self._scratch = np.empty((2, block), FLOAT)

    def step(self, state: SharedState, gradient: np.ndarray, into: SharedState | None = None) -> None:
        """Apply one averaged gradient, float32 of shape (layout.size,); the round grows by 1.

        In place, or if `into` is given, a state of the same layout with arrays of its own: then all of the
        result goes there, whatever was in it, and `state` stays as it is. The bits are the same.

        Raises StateError, and changes nothing, if the gradient has another shape or type or is not
        finite, if `into` does not fit, or if this process computes small numbers as 0.
        """
        target = state if into is None else into
        if into is not None:
            self._check_apart(state, into)
        scalars = self._scalars(state, self._clip_factor(state, gradient))
        for start, stop, decayed in self._pieces:
            part = slice(start, stop)
            self._step_piece(_cut_out(state, part), _cut_out(target, part), gradient[part], scalars, decayed)
        target.beta1_power = state.beta1_power * self._section.beta1
        target.beta2_power = state.beta2_power * self._section.beta2
        target.round = state.round + 1

    def _check_apart(self, state: SharedState, into: SharedState) -> None:
        """Vectors that overlap would be overwritten before they are read."""
        if into.layout.entries != self._layout.entries:
            raise StateError("The outer optimizer was built for another layout than that of the state it writes to.")
        if any(np.may_share_memory(one, other) for one in _vectors(state) for other in _vectors(into)):
            raise StateError("The outer step was told to write to a state that shares memory with the one it reads.")

    def _clip_factor(self, state: SharedState, gradient: np.ndarray) -> float:
        """Factor in (0, 1] that brings the gradient's norm to `clip_norm`; all checks happen here."""
        if state.layout.entries != self._layout.entries:
            raise StateError("The outer optimizer was built for another layout than the state's.")
        if gradient.dtype != FLOAT or gradient.shape != (self._layout.size,):
            raise StateError(
                f"The averaged gradient is {gradient.dtype} of shape {gradient.shape}, but must be "
                f"float32 of shape ({self._layout.size},)."
            )
        _check_subnormals()
        norm = math.sqrt(sum_of_squares(gradient))
        if not math.isfinite(norm):
            raise StateError("The averaged gradient holds a number that is not finite.")
        return min(1.0, (self._section.clip_norm or _MAX_NORM) / (norm + _CLIP_GUARD))

    def _scalars(self, state: SharedState, clip_factor: float) -> dict[str, np.float32]:
        """The step's scalars, each rounded once from float64."""
        section = self._section
        rate = learning_rate(section, self._rounds, state.round)
        values = {
            "clip": clip_factor,
            "keep": 1.0 - rate * section.weight_decay,
            "beta1": section.beta1,
            "other1": 1.0 - section.beta1,
            "beta2": section.beta2,
            "other2": 1.0 - section.beta2,
            "root_bias2": math.sqrt(1.0 - state.beta2_power * section.beta2),
            "epsilon": max(section.epsilon, _SMALLEST),  # 0 after rounding would divide 0 by 0
            "size": rate / (1.0 - state.beta1_power * section.beta1),
        }
        return {name: np.float32(value) for name, value in values.items()}

    def _step_piece(
        self,
        source: _Vectors,
        target: _Vectors,
        gradient: np.ndarray,
        scalars: dict[str, np.float32],
        decayed: bool,
    ) -> None:
        """One block. `out=` everywhere: each operation is one pass over arrays that stay in the cache."""
        params, m, v = target
        g, t = self._scratch[:, : params.size]
        np.multiply(gradient, scalars["clip"], out=g)
        np.multiply(source[1], scalars["beta1"], out=m)
        np.multiply(g, scalars["other1"], out=t)
        np.add(m, t, out=m)
        np.multiply(g, g, out=g)
        np.multiply(g, scalars["other2"], out=g)
        np.multiply(source[2], scalars["beta2"], out=v)
        np.add(v, g, out=v)
        np.sqrt(v, out=t)
        np.divide(t, scalars["root_bias2"], out=t)
        np.add(t, scalars["epsilon"], out=t)
        np.divide(m, t, out=t)
        np.multiply(t, scalars["size"], out=t)
        old = source[0]
        if decayed:
            old = np.multiply(old, scalars["keep"], out=params)
        np.subtract(old, t, out=params)


def _vectors(state: SharedState) -> _Vectors:
    return state.params, state.m, state.v


def _cut_out(state: SharedState, part: slice) -> _Vectors:
    return state.params[part], state.m[part], state.v[part]


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


def check_arithmetic() -> None:
    """Take known steps with a small state. Raises StateError if they lead elsewhere than on every other machine."""
    layout = Layout.of([("matrix", (61, 67)), ("vector", (13,))])
    state = SharedState.initial(layout, _known_numbers(layout.size, 3))
    section = OptimizerSection(
        learning_rate=4e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0, warmup_rounds=1,
        final_fraction=0.1,
    )  # fmt: skip
    optimizer = AdamW(section, rounds=4, layout=layout)
    for seed in (5, 7, 11):
        optimizer.step(state, _known_numbers(layout.size, seed))
    if state.digest() != _KNOWN_DIGEST:
        raise StateError(
            "This machine computes the outer step differently from others, so it would hold another state than they "
            "do; try another version of NumPy, and report it with the names of your processor and operating system."
        )


def _known_numbers(size: int, seed: int) -> np.ndarray:
    """Numbers of many magnitudes, made of integers and powers of two alone."""
    whole = np.arange(1, size + 1, dtype=np.int64) * (2654435761 * seed) % 16777213
    return np.ldexp((whole - 8388606).astype(FLOAT), (-20 - whole % 11).astype(np.int32)).astype(FLOAT)


def _check_subnormals() -> None:
    """Some libraries switch a thread to flush subnormal numbers to 0; its results would then differ."""
    small = np.full(16, _SMALLEST, FLOAT)
    np.multiply(small, np.float32(0.5), out=small)
    np.multiply(small, np.float32(2.0), out=small)
    if not (small == np.float32(_SMALLEST)).all():
        raise StateError(
            "This process computes very small numbers as 0, so its state would differ from that of other "
            "peers; unset whatever turns on flush-to-zero (for example a library built with -ffast-math)."
        )
