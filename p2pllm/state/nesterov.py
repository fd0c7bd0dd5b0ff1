"""SGD with and without Nesterov momentum: the outer optimizers of `diloco` (arXiv 2311.08105) and `sparse_loco`, where
an update is a mean pseudo-gradient: what the peers' own steps took off the parameters.

What does not live here: how a step is cut into blocks, and its checks (`outer`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2pllm.sections import OuterSection
from p2pllm.state.layout import Layout
from p2pllm.state.outer import BLOCK, OuterOptimizer, Scalars, falling


class _Sgd(OuterOptimizer):
    """What both have: a learning rate that falls with the rounds."""

    def __init__(
        self, section: OuterSection, rounds: int, layout: Layout, block: int = BLOCK, fragments: int = 1
    ) -> None:
        """rounds: of the whole run. block, fragments: as of OuterOptimizer."""
        super().__init__(layout, block, fragments)
        self._section = section
        self._rounds = rounds

    def scalars(self, round: int, clip: float) -> Scalars:  # noqa: A002 - the design's word
        """See OuterOptimizer."""
        section = self._section
        rate = falling(section.learning_rate, section.final_fraction, 0, self._rounds, round)
        values = {"clip": clip, "rate": rate, "momentum": section.momentum}
        return {name: np.float32(value) for name, value in values.items()}


class Nesterov(_Sgd):
    """b <- momentum * b + g;  params <- params - rate * (g + momentum * b), as torch.optim.SGD(nesterov=True)."""

    moments = ("momentum",)

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
        params, b = target
        g, t = scratch
        np.multiply(update, scalars["clip"], out=g)
        np.multiply(source[1], scalars["momentum"], out=b)
        np.add(b, g, out=b)
        np.multiply(b, scalars["momentum"], out=t)
        np.add(g, t, out=t)
        np.multiply(t, scalars["rate"], out=t)
        np.subtract(source[0], t, out=params)


class Sgd(_Sgd):
    """params <- params - rate * g: without momentum a state is nothing but its parameters."""

    moments = ()

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
        step = scratch[0]
        np.multiply(update, scalars["clip"], out=step)
        np.multiply(step, scalars["rate"], out=step)
        np.subtract(source[0], step, out=target[0])
