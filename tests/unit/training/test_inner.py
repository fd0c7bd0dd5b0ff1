"""Gradients: independent of how samples are cut, and whole even when memory runs out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from local_work import CPU, Cramped

from p2pllm.errors import StateError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.state import FLOAT
from p2pllm.training import inner
from p2pllm.training.data import Corpus
from p2pllm.training.evaluate import validation_loss
from p2pllm.training.inner import GradientAccumulator
from p2pllm.training.model import build, layout_of
from p2pllm.training.tokenizer import ByteTokenizer


@pytest.fixture
def model(draft: RunDraft, tokenizer: ByteTokenizer) -> torch.nn.Module:
    return build(draft, tokenizer)


def accumulator(model: torch.nn.Module, corpus: Corpus, micro_batch: int = 2) -> GradientAccumulator:
    return GradientAccumulator(model, corpus, CPU, run_id="run", peer="peer", micro_batch=micro_batch)


def mean(work: GradientAccumulator, model: torch.nn.Module) -> tuple[int, np.ndarray]:
    out = np.full(layout_of(model).size, np.nan, FLOAT)
    return work.finish(out), out


def test_the_mean_does_not_depend_on_micro_batches(model: torch.nn.Module, corpus: Corpus) -> None:
    results = []
    for micro_batch in (1, 3, 7, 100):
        work = accumulator(model, corpus, micro_batch)
        result = work.step(4, 0, 7)
        assert (result.samples, result.tokens) == (7, 7 * 16)
        assert result.loss == pytest.approx(math.log(257), rel=0.1)
        samples, gradient = mean(work, model)
        assert samples == 7
        results.append(gradient)
    for other in results[1:]:
        assert np.linalg.norm(other - results[0]) < 1e-5 * np.linalg.norm(results[0])


def test_it_is_the_gradient_of_the_mean_loss(model: torch.nn.Module, corpus: Corpus) -> None:
    work = accumulator(model, corpus)
    first, second = work.step(0, 0, 3), work.step(0, 1, 5)
    assert work.samples == 8
    samples, gradient = mean(work, model)
    windows = np.concatenate([corpus.draw("run", "peer", 0, 0, 3), corpus.draw("run", "peer", 0, 1, 5)])
    ids = torch.from_numpy(windows)
    loss = model(input_ids=ids, labels=ids).loss  # shifted inside
    loss.backward()
    expected = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])  # type: ignore[union-attr]
    assert samples == 8
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)
    assert (3 * first.loss + 5 * second.loss) / 8 == pytest.approx(float(loss.detach()), rel=1e-5)


def test_finish_starts_afresh(model: torch.nn.Module, corpus: Corpus) -> None:
    work = accumulator(model, corpus)
    work.step(0, 0, 2)
    _, first = mean(work, model)
    samples, nothing = mean(work, model)
    assert samples == work.samples == 0 and not nothing.any()
    work.step(0, 0, 2)
    assert np.array_equal(mean(work, model)[1], first)


@pytest.mark.parametrize("late", [False, True])
def test_when_memory_runs_out_nothing_is_counted_twice(model: torch.nn.Module, corpus: Corpus, late: bool) -> None:
    work = accumulator(model, corpus)
    work.step(0, 0, 9)
    _, expected = mean(work, model)
    cramped = Cramped(model, room=2, late=late)
    work = accumulator(cramped, corpus, micro_batch=8)
    assert work.step(0, 0, 9).samples == 9
    assert work.micro_batch == 2
    assert cramped.calls == [8, 4, 2, 2, 2, 2, 1]
    samples, gradient = mean(work, cramped)
    assert samples == 9
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


def test_one_sample_that_does_not_fit_is_one_sentence(model: torch.nn.Module, corpus: Corpus) -> None:
    work = accumulator(Cramped(model, room=0), corpus, micro_batch=4)
    with pytest.raises(WorkerError, match="One sample of 16 tokens does not fit"):
        work.step(0, 0, 4)
    assert work.samples == 0
    with pytest.raises(WorkerError, match="One sample of 16 tokens does not fit"):
        work.find_micro_batch()
    with pytest.raises(WorkerError, match="held-out sample does not fit"):
        validation_loss(Cramped(model, room=0), corpus.validation_windows(), CPU)


def test_other_errors_are_not_hidden(model: torch.nn.Module, corpus: Corpus) -> None:
    class Broken(Cramped):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        accumulator(Broken(model, 1), corpus).step(0, 0, 1)


def test_a_gradient_that_is_not_finite_never_leaves(model: torch.nn.Module, corpus: Corpus) -> None:
    work = accumulator(model, corpus)
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    work.step(0, 0, 1)
    with pytest.raises(WorkerError, match="not finite"):
        mean(work, model)
    assert work.samples == 0


def test_a_vector_that_does_not_fit_is_refused(model: torch.nn.Module, corpus: Corpus) -> None:
    work = accumulator(model, corpus)
    with pytest.raises(StateError):
        work.finish(np.zeros(3, FLOAT))
    with pytest.raises(StateError):
        work.finish(np.zeros(layout_of(model).size))


@pytest.mark.parametrize(
    ("seconds", "room", "expected"),
    [
        ({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.2}, 99, 4),  # 8 are no faster than 4
        ({1: 0.1, 2: 0.2}, 99, 1),
        ({1: 0.3, 2: 0.4, 4: 0.6}, 99, 4),  # 8 would take over a second
        ({1: 2.0}, 99, 1),
        ({1: 0.1, 2: 0.1}, 2, 2),  # 4 do not fit
    ],
)
def test_the_fastest_micro_batch_is_found(
    model: torch.nn.Module,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[int, float],
    room: int,
    expected: int,
) -> None:
    """On a clock that the size of the last pass moves."""
    cramped = Cramped(model, room)
    now = [0.0]

    def clock() -> float:
        return now[0]

    def passed(_device: torch.device) -> None:
        now[0] += seconds[cramped.calls[-1]]

    monkeypatch.setattr(inner.time, "perf_counter", clock)
    monkeypatch.setattr(inner, "synchronize", passed)
    work = accumulator(cramped, corpus, micro_batch=99)
    tried: list[int] = []
    assert work.find_micro_batch(trying=tried.append) == work.micro_batch == expected
    assert tried == [2**power for power in range(len(tried))] and set(cramped.calls) == set(tried)
    assert work.samples == 0 and not mean(work, cramped)[1].any(), "measuring adds nothing"


def test_validation_loss(model: torch.nn.Module, corpus: Corpus) -> None:
    windows = corpus.validation_windows()
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)  # shifted inside
    for micro_batch in (1, 4, 100):
        assert validation_loss(model, windows, CPU, micro_batch) == pytest.approx(expected, rel=1e-5)
    assert validation_loss(Cramped(model, room=2), windows, CPU, 6) == pytest.approx(expected, rel=1e-5)
    assert model.training, "its mode is kept"
    assert math.isnan(validation_loss(model, windows[:0], CPU))
