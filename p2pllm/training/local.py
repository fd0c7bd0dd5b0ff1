"""Inner work of the strategies `diloco` (arXiv 2311.08105) and `sparse_loco` (arXiv 2508.15706): local optimizer steps.

What does not live here: gradients (`inner`), the optimizers themselves (`optimizers`), how updates are compressed and
averaged (`averaging`), the outer optimizer and a round's learning rate (`state`), when a round begins and ends (the
programs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from p2pllm.errors import StateError, WorkerError
from p2pllm.sections import OptimizerSection
from p2pllm.state import FLOAT, Span
from p2pllm.training.data import Corpus
from p2pllm.training.inner import SampleGradients, StepResult
from p2pllm.training.model import read_params
from p2pllm.training.optimizers import InnerOptimizer


class LocalSteps(SampleGradients):
    """Inner optimizer steps from a start, and the pseudo-gradient that they make.

    With θ the parameters now and s the start, both flat, on the whole vector or on a span of it:

        begin(v, rate)   s ← v,  θ ← v
        step             θ ← inner optimizer(θ), with the rate of the last begin or go_on
        finish(out)      out ← s - θ                      the pseudo-gradient; changes nothing
        go_on(rate)      s ← θ                            the next round's inner work begins here
        land(v)          θ ← v + (θ - s),  s ← v          what was done since s is kept
        land(v, alpha)   θ ← alpha θ + (1 - alpha) v,  s ← v
        reset()          θ ← s

    - Whole rounds: begin(v0), steps, finish; begin(v1), steps, finish; ...
    - Communication hidden behind compute: begin(v0), steps, finish, go_on; steps while the update travels, land(v1),
      steps, finish, go_on; ... What is handed over is in each round just what the steps since go_on did.
    - Fragments (Streaming DiLoCo, arXiv 2501.18512): the same calls with the fragment's span, each fragment at its own
      times; begin and reset are always for all. With alpha, landing is the paper's merge.

    The learning rate comes from the run's round, so that who joins late does not warm up among trained peers. The
    optimizer's moments are this peer's own: they go on from round to round, whatever the parameters do.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        device: torch.device,
        *,
        run_id: str,
        peer: str,
        settings: OptimizerSection,
        micro_batch: int = 1,
    ) -> None:
        """Take the model, which must be on `device`, with its parameters as the start.

        run_id, peer: whose samples to draw; the attributes may be set. micro_batch: samples computed at once; it is
        halved when memory runs out; read the attribute. `samples` counts those since the start of the whole vector.
        `rate` is the learning rate of the steps; it is 0, and steps move nothing, until the first `begin`.
        """
        super().__init__(model, corpus, device, run_id=run_id, peer=peer, micro_batch=micro_batch)
        self.rate = 0.0
        self._optimizer = InnerOptimizer(model, settings)
        # on the host: parameters come from there and the pseudo-gradient goes there, so that this takes no memory of
        # the device and no transfer more than a start on the device would
        self._start = np.empty(self._layout.size, FLOAT)
        read_params(model, self._start)
        self._begun: dict[Span, int] = {}

    def begin(self, start: np.ndarray, rate: float) -> None:
        """Begin a round's inner work at `start`, float32 of shape (layout.size,), which is copied.

        rate: learning rate of the round's steps, all of them. Raises StateError if `start` does not fit.
        """
        for parameter, begun, given in self._pieces(start, None):
            np.copyto(begun, given)
            parameter.copy_(_tensor(given))
        self.rate = rate
        self._restart()

    def step(self, round: int, step: int, count: int) -> StepResult:  # noqa: A002 - the design's word
        """One inner optimizer step on the mean gradient of `count` samples, those that (run, peer, round, step) draw.

        When memory runs out, the micro-batch is halved and computed again. Raises WorkerError if even one sample does
        not fit; then no step was taken and none of the samples counts.
        """
        before = self.samples
        torch._foreach_zero_(self._sums)
        try:
            result = self._add(round, step, count)
        except WorkerError:
            self.samples = before
            raise
        torch._foreach_div_(self._sums, count)
        self._optimizer.step(self._sums, self.rate)
        return result

    def finish(self, out: np.ndarray, span: Span | None = None) -> int:
        """Write the pseudo-gradient into `out`, float32 of the span's size; returns the samples behind it.

        Nothing else changes: the model stays where it is, and begin, go_on or more steps of the round may follow.
        Raises StateError if `out` does not fit. Raises WorkerError if a number is not finite; the parameters are then
        back at the start and the moments fresh, since both hold such numbers.
        """
        for parameter, begun, to in self._pieces(out, span):
            np.subtract(begun, parameter.cpu().numpy(), out=to)
        if not np.isfinite(out).all():
            self.reset()
            self._optimizer.reset()
            raise WorkerError(
                "The pseudo-gradient holds a number that is not finite: the training diverges (lower the inner "
                "learning rate of the next run), or this device computes wrongly."
            )
        return self.samples - self._begun.get(span, 0) if span else self.samples

    @property
    def size(self) -> int:
        """Elements of the flat vector."""
        return self._layout.size

    def go_on(self, rate: float, span: Span | None = None) -> None:
        """Begin the next round's inner work at the present parameters, while the update of this one travels.

        rate: as in `begin`; with a span too it is that of all parameters.
        """
        for parameter, begun, _ in self._pieces(self._start[slice(*span) if span else slice(None)], span):
            np.copyto(begun, parameter.cpu().numpy())
        self.rate = rate
        if span:
            self._begun[span] = self.samples
        else:
            self._restart()

    def land(self, start: np.ndarray, span: Span | None = None, alpha: float | None = None) -> None:
        """Take a new start, float32 of the span's size, that other peers have too, below the steps since the old one.

        alpha: None keeps those steps whole; else the share of the present parameters in the mean with `start`, in
        [0, 1]. Raises StateError if `start` does not fit.
        """
        for parameter, begun, given in self._pieces(start, span):
            new = _tensor(given).to(self._device)
            if alpha is None:
                # in this order nothing is rounded where no step was taken: the parameters are then just the new start
                parameter.sub_(_tensor(begun).to(self._device)).add_(new)
            else:
                parameter.mul_(alpha).add_(new, alpha=1.0 - alpha)
            np.copyto(begun, given)

    def reset(self) -> None:
        """Drop the work since the start: the parameters are there again. Moments and rate are kept."""
        for parameter, begun, _ in self._pieces(self._start, None):
            parameter.copy_(_tensor(begun))
        self._restart()

    @contextlib.contextmanager
    def aside(self, params: np.ndarray) -> Iterator[None]:
        """Have the model hold `params`, float32 of shape (layout.size,), for a while, for example to evaluate them."""
        kept = np.empty(self._layout.size, FLOAT)
        read_params(self._model, kept)
        try:
            for parameter, _, given in self._pieces(params, None):
                parameter.copy_(_tensor(given))
            yield
        finally:
            for parameter, _, given in self._pieces(kept, None):
                parameter.copy_(_tensor(given))

    def save(self, path: Path) -> None:
        """Keep the optimizer's moments for the next process. Raises StateError if the disk does not take them."""
        self._optimizer.save(path, self.run_id)

    def load(self, path: Path) -> bool:
        """Take the moments that `save` wrote; whether that was done. What cannot be used makes them fresh."""
        return self._optimizer.load(path, self.run_id)

    def _restart(self) -> None:
        self.samples = 0
        self._begun.clear()

    def _pieces(self, vector: np.ndarray, span: Span | None) -> Iterator[tuple[torch.Tensor, np.ndarray, np.ndarray]]:
        """(parameter, start, vector) of each parameter as far as it lies in the span, flat and open for writing."""
        first, last = span or (0, self._layout.size)
        if vector.dtype != FLOAT or vector.shape != (last - first,):
            raise StateError(
                f"A vector for elements {first} to {last} is {vector.dtype} of shape {vector.shape}, but must be "
                f"float32 of shape ({last - first},)."
            )
        for entry, parameter in zip(self._layout.entries, self._parameters, strict=True):
            start, stop = max(entry.offset, first), min(entry.offset + entry.size, last)
            if start < stop:
                flat = parameter.detach().view(-1)[start - entry.offset : stop - entry.offset]
                yield flat, self._start[start:stop], vector[start - first : stop - first]


def _tensor(values: np.ndarray) -> torch.Tensor:
    """torch warns about arrays that it must not write to, although it only reads these."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())
