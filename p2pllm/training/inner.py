"""Gradients of a peer's samples in micro-batches that fit memory; the inner work of the strategy `sync`, their mean.

What does not live here: inner optimizer steps (`local`), the parameters' way between host and device (`model`),
averaging (`averaging`), the outer optimizer (`state.outer`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from p2pllm.errors import OutOfMemoryError, StateError, WorkerError
from p2pllm.state import FLOAT
from p2pllm.training.data import Corpus
from p2pllm.training.device import autocast, is_out_of_memory, release_memory, synchronize
from p2pllm.training.model import layout_of, trained_parameters

_WORTH_IT = 1.05
"""A larger micro-batch must compute this many times as many samples a second to be taken."""

_MEASURED = 4
_MEASURED_SECONDS = 0.5
"""Passes of which the fastest after the first counts, since other programs slow some down; and when to stop early."""

_Computed = tuple[tuple[torch.Tensor, ...], torch.Tensor]
"""Sums over the samples of a micro-batch: of the gradients, one a parameter, and of the loss."""


@dataclass(frozen=True)
class StepResult:
    """What one step added: samples, tokens predicted, and the mean loss in nats a token."""

    samples: int
    tokens: int
    loss: float


class SampleGradients:
    """Sums the gradients of samples that a peer draws; base of what makes an update of them.

    A sample's loss is the mean over its tokens, and what is summed are the samples' gradients, in float32. So
    the mean is that of the samples, however they are cut into micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        device: torch.device,
        *,
        run_id: str,
        peer: str,
        micro_batch: int = 1,
    ) -> None:
        """Take the model, which must be on `device`. run_id, peer: whose samples to draw; the attributes may be set.

        micro_batch: samples computed at once; it is halved when memory runs out; read the attribute.
        """
        self.micro_batch = micro_batch
        self.samples_per_s = 0.0  # with the micro-batch that `find_micro_batch` found
        self.samples = 0
        self._model = model
        self._corpus = corpus
        self._device = device
        self.run_id, self.peer = run_id, peer
        self._layout = layout_of(model)
        self._parameters = [parameter for _, parameter in trained_parameters(model)]
        self._sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self._parameters]

    def find_micro_batch(
        self, target_seconds: float = 1.0, limit: int = 1024, trying: Callable[[int], None] = lambda size: None
    ) -> int:
        """Measure and set the micro-batch that this machine computes fastest; returns it.

        It is doubled from 1 while that gives more than 5 % more samples a second, one micro-batch takes less
        than `target_seconds`, memory suffices and `limit` is not passed. What was added is kept. trying: called with
        each size before it is computed, as the system may end the process over it. Raises WorkerError if not even one
        sample fits in memory.
        """
        self._model.train()
        best, best_rate, size = 1, 0.0, 1
        while size <= limit:
            trying(size)
            seconds = self._measure(size)
            if seconds is None:
                if size == 1:
                    raise self._too_large()
                break
            rate = size / seconds
            if rate <= best_rate * _WORTH_IT:
                break
            best, best_rate = size, rate
            if 2 * seconds >= target_seconds:  # the next size would take about twice as long
                break
            size *= 2
        self.micro_batch, self.samples_per_s = best, best_rate
        return best

    def _add(self, round: int, step: int, count: int) -> StepResult:  # noqa: A002 - the design's word
        """Add the gradients of `count` samples, those that (run, peer, round, step) draw, to the sums.

        Raises WorkerError if one sample does not fit; what was added before stays, and `samples` counts it.
        """
        self._model.train()
        windows = torch.from_numpy(self._corpus.draw(self.run_id, self.peer, round, step, count))
        loss = torch.zeros((), dtype=torch.float64)
        for size, gradients, part in self._micro_batches(windows):
            torch._foreach_add_(self._sums, gradients)
            loss += part.double().cpu()
            self.samples += size
        return StepResult(count, count * (windows.shape[1] - 1), float(loss) / count)

    def _micro_batches(self, windows: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...], torch.Tensor]]:
        """(samples, gradients, loss) of each micro-batch, halving it when memory runs out."""
        done = 0
        while done < len(windows):
            part = windows[done : done + self.micro_batch]
            computed = self._try(part)
            if computed is not None:
                done += len(part)
                yield len(part), *computed
            elif len(part) == 1:
                self.micro_batch = 1
                raise self._too_large()
            else:
                self.micro_batch = len(part) // 2

    def _try(self, windows: torch.Tensor) -> _Computed | None:
        """Gradients and loss of a micro-batch; None if memory ran out, all of it then being free again."""
        try:
            return self._compute(windows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # only after the handler: while it runs, the traceback keeps the failed pass's tensors alive
        release_memory(self._device)
        return None

    def _compute(self, windows: torch.Tensor) -> _Computed:
        """(sum over samples of the gradients, sum over samples of the loss).

        torch.autograd.grad instead of backward(): it hands out gradients only when it has all of them, so a
        pass that fails half-way leaves nothing behind.
        """
        loss = sum_of_losses(self._model, windows.to(self._device))
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        return gradients, loss.detach()

    def _measure(self, size: int) -> float | None:
        """Seconds of one micro-batch of `size` samples; None if it does not fit in memory."""
        windows = torch.from_numpy(self._corpus.draw(self.run_id, self.peer, 0, 0, size))
        best, spent = math.inf, 0.0
        for attempt in range(_MEASURED):
            started = time.perf_counter()
            if self._try(windows) is None:
                return None
            synchronize(self._device)
            seconds = time.perf_counter() - started
            spent += seconds
            if attempt > 0:  # the first pass allocates and chooses kernels
                best = min(best, seconds)
                if spent > _MEASURED_SECONDS:
                    break
        return max(best, 1e-9)

    def _too_large(self) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"One sample of {self._corpus.window_length - 1} tokens does not fit in the memory of the device "
            f"{self._device}; free some of it, or choose another device."
        )


class GradientAccumulator(SampleGradients):
    """Sums gradients of samples on the model's current parameters until `finish` takes their mean.

    Peers' means average to the swarm's with the numbers of samples as weights.
    """

    def step(self, round: int, step: int, count: int) -> StepResult:  # noqa: A002 - the design's word
        """Add the gradients of `count` samples, those that (run, peer, round, step) draw.

        When memory runs out, the micro-batch is halved and computed again. Raises WorkerError if even one
        sample does not fit; what was added before stays, and `samples` counts it.
        """
        return self._add(round, step, count)

    def finish(self, out: np.ndarray) -> int:
        """Write the mean gradient a sample into `out`, float32 of shape (layout.size,), and start afresh.

        Returns the number of samples; with 0, `out` becomes zeros. Raises StateError if `out` does not fit,
        WorkerError if a gradient is not finite.
        """
        if out.dtype != FLOAT:
            raise StateError(f"The vector for the gradient has elements of type {out.dtype}, not float32.")
        samples = self.samples
        for view, total in zip(self._layout.views(out).values(), self._sums, strict=True):
            np.copyto(view, total.div_(max(samples, 1)).cpu().numpy())
        self.reset()
        if not np.isfinite(out).all():
            raise WorkerError(
                "The gradient holds a number that is not finite: the training diverges (lower the learning "
                "rate of the next run), or this device computes wrongly."
            )
        return samples

    def reset(self) -> None:
        """Forget what was added."""
        torch._foreach_zero_(self._sums)
        self.samples = 0


def sum_of_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Sum over samples of the mean next-token loss, in nats; a float32 scalar.

    windows: int64 of shape (samples, tokens + 1) on the model's device.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    with autocast(windows.device):
        logits = model(input_ids=inputs, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return loss / inputs.shape[1]
