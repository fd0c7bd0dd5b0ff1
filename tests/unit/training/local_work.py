"""What the tests of inner work share: settings, a model short of memory, and what local steps made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from p2pllm.sections import OptimizerSection
from p2pllm.state import FLOAT
from p2pllm.training.local import LocalSteps
from p2pllm.training.model import read_params

CPU = torch.device("cpu")
SETTINGS = OptimizerSection(epsilon=1e-6, batch=6)
MUON = SETTINGS.model_copy(update={"type": "muon"})
RATE = 3e-3
"""Learning rate of a round; not the one in the settings, which is a whole run's."""

MakeWork = Callable[..., LocalSteps]


class Cramped(torch.nn.Module):
    """A model whose memory suffices for `room` samples; `calls` are the sizes that were tried."""

    def __init__(self, model: Any, room: int, late: bool = False) -> None:
        """late: memory runs out half-way through the backward pass, else with the forward pass."""
        super().__init__()
        self.inner = model
        self.room, self.late = room, late
        self.calls: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.calls.append(len(input_ids))
        output = self.inner(input_ids=input_ids, use_cache=use_cache)
        if len(input_ids) > self.room:
            if not self.late:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            self.inner.model.layers[0].mlp.up_proj.weight.register_hook(self.fail)
        return output

    def fail(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.calls[-1] > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return gradient


def params(work: LocalSteps) -> np.ndarray:
    out = np.full(work._layout.size, np.nan, FLOAT)
    read_params(work._model, out)
    return out


def pseudo_gradient(work: LocalSteps, span: tuple[int, int] | None = None) -> tuple[int, np.ndarray]:
    """(samples, vector)."""
    first, last = span or (0, work._layout.size)
    out = np.full(last - first, np.nan, FLOAT)
    return work.finish(out, span), out


def moved(vector: np.ndarray, seed: int) -> np.ndarray:
    """Another vector, as an outer step would make it."""
    noise = np.random.default_rng(seed).standard_normal(vector.size)
    return (vector + 0.003 * noise).astype(FLOAT)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Relative, in the L2 norm."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
