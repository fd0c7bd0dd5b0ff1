"""Which outer optimizer a run has, and whether this machine computes its steps as others do.

What does not live here: the steps themselves (`outer`, `adamw`, `nesterov`).
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from p2pllm.errors import ArithmeticsError
from p2pllm.manifest import RunDraft
from p2pllm.sections import OptimizerSection
from p2pllm.state.adamw import AdamW
from p2pllm.state.layout import FLOAT, Layout
from p2pllm.state.nesterov import Nesterov, Sgd
from p2pllm.state.outer import OuterOptimizer
from p2pllm.state.shared import SharedState

_KNOWN_DIGEST = "64a331836b235b87b8adb31a0e72e650b4bb4275123a0de5cdf93f5620b2d75a"
"""Of the parameters after the steps of `check_arithmetic`."""


def moments_of(draft: RunDraft) -> tuple[str, ...]:
    """The vectors that a run's states have beside the parameters."""
    return AdamW.moments if draft.round.strategy == "sync" else _sgd(draft).moments


def outer_optimizer(draft: RunDraft, layout: Layout) -> OuterOptimizer:
    """The outer optimizer of a run. layout: with the moments that `moments_of` names."""
    if draft.round.strategy == "sync":
        return AdamW(draft.optimizer, draft.round.rounds, layout)
    return _sgd(draft)(draft.outer, draft.round.rounds, layout, fragments=draft.round.fragments)


def _sgd(draft: RunDraft) -> type[Nesterov | Sgd]:
    return Nesterov if draft.outer.momentum else Sgd


def check_arithmetic() -> None:
    """Take known steps with a small state. Raises ArithmeticsError if they lead elsewhere than on other machines."""
    layout = Layout.of([("matrix", (61, 67)), ("vector", (13,))])
    state = SharedState.initial(layout, _known_numbers(layout.size, 3))
    section = OptimizerSection(
        learning_rate=4e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0, warmup_rounds=1,
        final_fraction=0.1,
    )  # fmt: skip
    optimizer = AdamW(section, rounds=4, layout=layout)
    for seed in (5, 7, 11):
        optimizer.step(state, _known_numbers(layout.size, seed))
    if blake3(state.params.tobytes()).hexdigest() != _KNOWN_DIGEST:
        raise ArithmeticsError(
            "This machine computes the outer step differently from others, so it would hold another state than they "
            "do; try another version of NumPy, and report it with the names of your processor and operating system."
        )


def _known_numbers(size: int, seed: int) -> np.ndarray:
    """Numbers of many magnitudes, made of integers and powers of two alone."""
    whole = np.arange(1, size + 1, dtype=np.int64) * (2654435761 * seed) % 16777213
    return np.ldexp((whole - 8388606).astype(FLOAT), (-20 - whole % 11).astype(np.int32)).astype(FLOAT)
