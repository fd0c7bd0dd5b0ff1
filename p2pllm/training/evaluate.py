"""Evaluation: the loss on held-out windows.

What does not live here: which windows these are (`data`), when to evaluate (the programs).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from p2pllm.errors import OutOfMemoryError
from p2pllm.training.device import is_out_of_memory, release_memory
from p2pllm.training.inner import sum_of_losses


def validation_loss(model: nn.Module, windows: np.ndarray, device: torch.device, micro_batch: int = 1) -> float:
    """Mean next-token loss over all tokens of the windows, in nats a token; nan if there are no windows.

    windows: int64 of shape (samples, context_length + 1). The model must be on `device`; its mode (training
    or not) is kept. When memory runs out the micro-batch is halved. Raises WorkerError if one window does
    not fit.
    """
    was_training = model.training
    model.eval()
    try:
        return _mean_loss(model, windows, device, max(1, micro_batch))
    finally:
        model.train(was_training)


def _mean_loss(model: nn.Module, windows: np.ndarray, device: torch.device, micro_batch: int) -> float:
    total, done = 0.0, 0
    while done < len(windows):
        part = windows[done : done + micro_batch]
        loss = _try(model, part, device)
        if loss is not None:
            total += loss
            done += len(part)
        elif len(part) > 1:
            micro_batch = len(part) // 2
        else:
            raise OutOfMemoryError(
                f"One held-out sample does not fit in the memory of the device {device}; free some of it, or "
                "choose another device."
            )
    return total / len(windows) if len(windows) else math.nan


def _try(model: nn.Module, windows: np.ndarray, device: torch.device) -> float | None:
    """Sum of the samples' losses; None if memory ran out."""
    try:
        with torch.no_grad():
            return float(sum_of_losses(model, torch.from_numpy(windows).to(device)))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory(device)
    return None
