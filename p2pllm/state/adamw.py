"""AdamW (arXiv 1711.05101) as the outer optimizer of `sync`, where an update is a mean gradient.

What does not live here: how a step is cut into blocks, and its checks (`outer`); inner optimizers (`training`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from p2pllm.sections import OptimizerSection
from p2pllm.state.layout import MOMENTS, Layout
from p2pllm.state.outer import BLOCK, SMALLEST, OuterOptimizer, Scalars, falling


def learning_rate(section: OptimizerSection, rounds: int, round: int) -> float:  # noqa: A002 - the design's word
    """Learning rate of the round that leads from state `round` to `round + 1` in a run of `rounds` rounds."""
    return falling(section.learning_rate, section.final_fraction, section.warmup_rounds, rounds, round)


class AdamW(OuterOptimizer):
    """AdamW with clipping by norm, decoupled decay of the matrices, and a schedule.

    Vectors (biases, the gains of norms) are not decayed, as is usual for language models. The step is that of
    torch.optim.AdamW up to rounding.
    """

    moments = MOMENTS

    def __init__(self, section: OptimizerSection, rounds: int, layout: Layout, block: int = BLOCK) -> None:
        """rounds: of the whole run. block: elements worked on at once, which changes speed only."""
        super().__init__(layout, block)
        self.clip_norm = section.clip_norm
        self._section = section
        self._rounds = rounds
        self._beta1, self._beta2 = _Power(section.beta1), _Power(section.beta2)

    def scalars(self, round: int, clip: float) -> Scalars:  # noqa: A002 - the design's word
        """See OuterOptimizer."""
        section = self._section
        rate = learning_rate(section, self._rounds, round)
        values = {
            "clip": clip,
            "keep": 1.0 - rate * section.weight_decay,
            "beta1": section.beta1,
            "other1": 1.0 - section.beta1,
            "beta2": section.beta2,
            "other2": 1.0 - section.beta2,
            "root_bias2": math.sqrt(1.0 - self._beta2.to(round + 1)),
            "epsilon": max(section.epsilon, SMALLEST),  # 0 after rounding would divide 0 by 0
            "size": rate / (1.0 - self._beta1.to(round + 1)),
        }
        return {name: np.float32(value) for name, value in values.items()}

    def move(
        self,
        source: Sequence[np.ndarray],
        target: Sequence[np.ndarray],
        update: np.ndarray,
        scalars: Scalars,
        scratch: np.ndarray,
        decayed: bool,
    ) -> None:
        """See OuterOptimizer."""
        params, m, v = target
        g, t = scratch
        np.multiply(update, scalars["clip"], out=g)
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


class _Power:
    """Powers of a number from 0 to 1, by multiplication in float64, because pow() differs between math libraries."""

    def __init__(self, base: float) -> None:
        self._base = base
        self._exponent, self._power = 0, 1.0

    def to(self, exponent: int) -> float:
        """base ** exponent; quick for exponents that grow."""
        if exponent < self._exponent:
            self._exponent, self._power = 0, 1.0
        while self._exponent < exponent and self._power > _NOTHING:
            self._power *= self._base
            self._exponent += 1
        return self._power if self._power > _NOTHING else 0.0


_NOTHING = 2.0**-60
"""1 minus a power that is smaller is 1 in float64, so smaller ones are all the same."""
