"""InnerWork: a round's work of one peer, as its strategy has it, behind one interface.

What does not live here: gradients (`inner`), local steps (`local`), and when a round begins and ends (the programs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from p2pllm.manifest import RunDraft
from p2pllm.state import Span, span_of
from p2pllm.state.adamw import learning_rate
from p2pllm.training.data import Corpus
from p2pllm.training.inner import GradientAccumulator, StepResult
from p2pllm.training.local import LocalSteps
from p2pllm.training.model import write_params

LARGEST_SHARE = 8
"""A micro-batch of gradients is at most one such part of a round's samples, so that rounds end near their target."""


class InnerWork(Protocol):
    """What the worker does between `begin` and `finish`. Vectors are flat float32, as the layout has them."""

    @property
    def samples(self) -> int:
        """Samples behind the update so far."""
        ...

    @property
    def micro_batch(self) -> int:
        """Samples computed at once; it is halved when memory runs out."""
        ...

    def take_micro_batch(self, size: int) -> None:
        """Compute so many samples at once from now on."""
        ...

    def draw_for(self, run_id: str, peer: str) -> None:
        """Whose samples to draw."""
        ...

    def find_micro_batch(self, trying: Callable[[int], None]) -> float:
        """Measure and set the micro-batch that this machine computes fastest; returns samples a second.

        trying: called with each size before it is computed. Raises OutOfMemoryError if no sample fits.
        """
        ...

    def begin(self, params: np.ndarray, round: int) -> None:  # noqa: A002 - the design's word
        """Start on the round after state `round`, at `params`, float32 of shape (parameters,), which are copied."""
        ...

    def step(self, round: int, number: int) -> StepResult:  # noqa: A002 - the design's word
        """Compute the smallest piece of work, the one with this number in the round, 0 the first.

        Raises OutOfMemoryError if not even one sample fits in memory.
        """
        ...

    def finish(self, out: np.ndarray) -> tuple[int, int]:
        """Write the update into the beginning of `out`, float32 of shape (parameters,).

        Returns its elements, fewer than that for a fragment, and the samples behind it. Raises WorkerError if a number
        of it is not finite.
        """
        ...

    def reset(self) -> None:
        """Drop the round's work."""
        ...

    def holding(self, params: np.ndarray) -> contextlib.AbstractContextManager[None]:
        """Have the model hold `params`, float32 of shape (parameters,), for a while, for example to evaluate them."""
        ...

    def save(self, path: Path) -> None:
        """Keep what is the peer's own for the next process. Raises StateError if the disk does not take it."""
        ...

    def load(self, path: Path) -> None:
        """Take what `save` wrote, if it can be used."""
        ...


class Gradients:
    """`sync`: the mean gradient of the samples, on the parameters of the round's start."""

    def __init__(
        self, draft: RunDraft, model: nn.Module, corpus: Corpus, device: torch.device, micro_batch: int
    ) -> None:
        self._accumulator = GradientAccumulator(model, corpus, device, run_id="", peer="", micro_batch=micro_batch)
        self._model = model
        self._largest = max(1, draft.round.samples // LARGEST_SHARE)

    @property
    def samples(self) -> int:
        """See InnerWork."""
        return self._accumulator.samples

    @property
    def micro_batch(self) -> int:
        """See InnerWork."""
        return self._accumulator.micro_batch

    def draw_for(self, run_id: str, peer: str) -> None:
        """See InnerWork."""
        self._accumulator.run_id, self._accumulator.peer = run_id, peer

    def take_micro_batch(self, size: int) -> None:
        """See InnerWork."""
        self._accumulator.micro_batch = size

    def find_micro_batch(self, trying: Callable[[int], None]) -> float:
        """See InnerWork."""
        self._accumulator.find_micro_batch(limit=self._largest, trying=trying)
        return self._accumulator.samples_per_s

    def begin(self, params: np.ndarray, round: int) -> None:  # noqa: A002 - the design's word
        """See InnerWork."""
        self._accumulator.reset()
        write_params(self._model, params)

    def step(self, round: int, number: int) -> StepResult:  # noqa: A002 - the design's word
        """See InnerWork: one micro-batch."""
        return self._accumulator.step(round, number, self._accumulator.micro_batch)

    def finish(self, out: np.ndarray) -> tuple[int, int]:
        """See InnerWork."""
        return out.size, self._accumulator.finish(out)

    def reset(self) -> None:
        """See InnerWork."""
        self._accumulator.reset()

    @contextlib.contextmanager
    def holding(self, params: np.ndarray) -> Iterator[None]:
        """See InnerWork. They stay: every round begins with the shared parameters anyway."""
        write_params(self._model, params)
        yield

    def save(self, path: Path) -> None:
        """See InnerWork: there is nothing."""

    def load(self, path: Path) -> None:
        """See InnerWork: there is nothing."""


class Local:
    """`diloco` and `sparse_loco`: steps of the peer's own optimizer, and how far they led.

    It alone can go on while an update travels: gradients are taken where the state is. With fragments each round hands
    over one of them, with what was done to it since it last landed; the others stay where the steps led them.
    """

    def __init__(
        self, draft: RunDraft, model: nn.Module, corpus: Corpus, device: torch.device, micro_batch: int
    ) -> None:
        self._steps = LocalSteps(
            model, corpus, device, run_id="", peer="", settings=draft.optimizer, micro_batch=micro_batch
        )
        self._section, self._rounds = draft.optimizer, draft.round
        self._round = self._landed = 0  # that we work on; that all fragments have landed of
        self._before = 0  # samples of earlier rounds, in the fragments that have yet to be handed over

    @property
    def samples(self) -> int:
        """See InnerWork."""
        return self._steps.samples - self._before

    @property
    def micro_batch(self) -> int:
        """See InnerWork."""
        return self._steps.micro_batch

    def draw_for(self, run_id: str, peer: str) -> None:
        """See InnerWork."""
        self._steps.run_id, self._steps.peer = run_id, peer

    def take_micro_batch(self, size: int) -> None:
        """See InnerWork."""
        self._steps.micro_batch = size

    def find_micro_batch(self, trying: Callable[[int], None]) -> float:
        """See InnerWork."""
        self._steps.find_micro_batch(limit=self._section.batch, trying=trying)
        return self._steps.samples_per_s

    def begin(self, params: np.ndarray, round: int) -> None:  # noqa: A002 - the design's word
        """See InnerWork."""
        self._round = self._landed = round
        self._before = 0
        self._steps.begin(params, self._rate(round))

    def step(self, round: int, number: int) -> StepResult:  # noqa: A002 - the design's word
        """See InnerWork: one step of the inner optimizer."""
        return self._steps.step(round, number, self._section.batch)

    def finish(self, out: np.ndarray) -> tuple[int, int]:
        """See InnerWork. The samples are those of this round, with fragments too: nobody is credited twice."""
        first, last = self._span(self._round)
        samples = self.samples
        self._steps.finish(out[: last - first], (first, last))
        return last - first, samples

    def go_on(self, round: int) -> None:  # noqa: A002 - the design's word
        """Work on the round after state `round` from the present parameters: that state is not there yet."""
        if self._rounds.fragments > 1:
            self._before = self._steps.samples
            self._steps.go_on(self._rate(round), self._span(self._round))
        else:
            self._steps.go_on(self._rate(round))
        self._round = round

    def land(self, params: np.ndarray, round: int) -> None:  # noqa: A002 - the design's word
        """The state is there: `params` become the start, and what was done since `go_on` is kept on top.

        With fragments those land that the rounds since the last landing moved, in the mean with our own.
        """
        self._steps.rate = self._rate(round)
        if self._rounds.fragments == 1:
            self._steps.land(params)
        else:
            for moved in range(max(self._landed, round - self._rounds.fragments), round):
                span = self._span(moved)
                self._steps.land(params[slice(*span)], span, self._rounds.own_share)
        self._round = self._landed = round

    def _span(self, round: int) -> Span:  # noqa: A002 - the design's word
        return span_of(self._steps.size, self._rounds.fragments, round)

    def _rate(self, round: int) -> float:  # noqa: A002 - the design's word
        return learning_rate(self._section, self._rounds.rounds, round)

    def reset(self) -> None:
        """See InnerWork."""
        self._steps.reset()
        self._before = 0

    def holding(self, params: np.ndarray) -> contextlib.AbstractContextManager[None]:
        """See InnerWork."""
        return self._steps.aside(params)

    def save(self, path: Path) -> None:
        """See InnerWork: the moments of the optimizer."""
        self._steps.save(path)

    def load(self, path: Path) -> None:
        """See InnerWork."""
        self._steps.load(path)


def inner_work(
    draft: RunDraft, model: nn.Module, corpus: Corpus, device: torch.device, micro_batch: int = 1
) -> Gradients | Local:
    """The inner work of a run's strategy, on a model that is on `device`."""
    kind = Gradients if draft.round.strategy == "sync" else Local
    return kind(draft, model, corpus, device, micro_batch)
