"""Local steps: what torch's own loop does, however samples are cut; memory that runs out; what outlives a process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_work import CPU, MUON, RATE, SETTINGS, Cramped, MakeWork, distance, moved, params, pseudo_gradient

from p2pllm.errors import StateError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.sections import OptimizerSection
from p2pllm.state import FLOAT
from p2pllm.training.data import Corpus
from p2pllm.training.inner import sum_of_losses
from p2pllm.training.local import LocalSteps
from p2pllm.training.model import build
from p2pllm.training.tokenizer import ByteTokenizer

BATCHES = [(3, 0, 6), (3, 1, 6), (3, 2, 5), (4, 0, 6), (4, 1, 1)]
RATES = {3: 3e-3, 4: 2e-3}
"""Of each round."""


def plain_loop(
    model: Any, corpus: Corpus, settings: OptimizerSection, batches: list[tuple[int, int, int]]
) -> list[float]:
    """The same with torch alone: AdamW, or Muon for all projections of this architecture. Returns the losses."""
    matrices = [p for name, p in model.named_parameters() if "_proj" in name]
    others = [p for name, p in model.named_parameters() if "_proj" not in name]
    gains = [p for p in others if p.ndim < 2]
    tables = [p for p in others if p.ndim >= 2]
    betas, decay = (settings.beta1, settings.beta2), settings.weight_decay
    if settings.type == "muon":
        optimizers: list[Any] = [
            torch.optim.Muon(matrices, weight_decay=decay, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
        ]
    else:
        optimizers = [torch.optim.AdamW(matrices, betas=betas, eps=settings.epsilon, weight_decay=decay)]
    optimizers.append(torch.optim.AdamW(tables, betas=betas, eps=settings.epsilon, weight_decay=decay))
    optimizers.append(torch.optim.AdamW(gains, betas=betas, eps=settings.epsilon, weight_decay=0.0))
    losses = []
    for round_, step, count in batches:
        ids = torch.from_numpy(corpus.draw("run", "peer", round_, step, count))
        loss = sum_of_losses(model, ids)
        loss.backward()
        torch._foreach_div_([p.grad for p in model.parameters()], count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATES[round_]
            optimizer.step()
        model.zero_grad()
        losses.append(float(loss.detach()) / count)
    return losses


@pytest.mark.parametrize(
    ("settings", "micro_batch", "near"),
    [
        (SETTINGS, 100, 1e-7),
        (SETTINGS, 4, 1e-4),  # sums in another order: a first step of Adam is as long for a tiny gradient as for any
        (SETTINGS, 1, 1e-4),
        (MUON, 100, 1e-7),
        (MUON, 4, 2e-2),  # in bfloat16 that shows more
    ],
)
def test_it_is_what_torch_does(
    make_work: MakeWork,
    draft: RunDraft,
    tokenizer: ByteTokenizer,
    corpus: Corpus,
    settings: OptimizerSection,
    micro_batch: int,
    near: float,
) -> None:
    model = build(draft, tokenizer)
    work = make_work(settings, micro_batch)
    start = params(work)
    losses = plain_loop(model, corpus, settings, BATCHES)
    work.begin(start, RATES[3])
    results = [work.step(*batch) for batch in BATCHES[:3]]
    samples, update = pseudo_gradient(work)
    between = params(work)
    assert samples == 17 and np.array_equal(update, start - between)
    work.go_on(RATES[4])
    results += [work.step(*batch) for batch in BATCHES[3:]]
    samples, update = pseudo_gradient(work)
    assert samples == work.samples == 7 and np.array_equal(update, between - params(work))
    assert [(result.samples, result.tokens) for result in results] == [(6, 96), (6, 96), (5, 80), (6, 96), (1, 16)]
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-4)
    expected = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    assert distance(start - params(work), start - expected) < near


def test_the_moments_go_on_from_round_to_round(make_work: MakeWork) -> None:
    """A round begun where the last one ended is no cut at all; fresh moments would be."""
    through, cut, fresh = make_work(), make_work(), make_work()
    for step in range(4):
        through.step(0, step, 6)
        for other in (cut, fresh):
            other.step(0, step, 6)
            if step == 1:
                other.begin(params(other), RATE)
        if step == 1:
            fresh._optimizer.reset()
    assert np.array_equal(params(through), params(cut))
    assert distance(params(fresh), params(through)) > 1e-3


def test_the_rate_is_that_of_the_round(make_work: MakeWork) -> None:
    """The first step of AdamW is as long as the rate, whatever the gradient."""
    settings = SETTINGS.model_copy(update={"weight_decay": 0.0, "epsilon": 1e-12})
    for rate in (1e-3, 7e-3):
        work = make_work(settings)
        work.begin(params(work), rate)
        work.step(0, 0, 6)
        assert np.abs(pseudo_gradient(work)[1]).max() == pytest.approx(rate, rel=1e-3)
        work.land(moved(params(work), 1))
        assert work.rate == rate, "until a round begins"


def test_steps_move_nothing_until_a_round_begins(draft: RunDraft, tokenizer: ByteTokenizer, corpus: Corpus) -> None:
    work = LocalSteps(build(draft, tokenizer), corpus, CPU, run_id="run", peer="peer", settings=SETTINGS)
    before = params(work)
    work.step(0, 0, 6)
    assert np.array_equal(params(work), before)


@pytest.mark.parametrize("span", [None, (40, 5000)])
def test_going_on_takes_the_rate_of_the_next_round(make_work: MakeWork, span: tuple[int, int] | None) -> None:
    """Moments go on, so only a rate of 0 has a step whose length is known."""
    work = make_work()
    work.step(0, 0, 6)
    before = params(work)
    work.go_on(0.0, span)
    work.step(1, 0, 6)
    assert np.array_equal(params(work), before)
    work.go_on(RATE, span)
    work.step(2, 0, 6)
    assert not np.array_equal(params(work), before)


@pytest.mark.filterwarnings("error")
def test_begin_takes_a_copy(make_work: MakeWork) -> None:
    work = make_work()
    start = moved(params(work), 1)
    work.begin(start, RATE)
    assert np.array_equal(params(work), start)
    start[:] = 9.0  # the daemon writes the next parameters there
    samples, update = pseudo_gradient(work)
    assert samples == 0 and not update.any()
    readable = moved(params(work), 2)
    readable.flags.writeable = False
    work.begin(readable, RATE)
    assert np.array_equal(params(work), readable)


def test_finish_changes_nothing(make_work: MakeWork) -> None:
    once, twice = make_work(), make_work()
    for step in range(2):
        once.step(0, step, 6)
        twice.step(0, step, 6)
        samples, update = pseudo_gradient(twice)
        assert samples == 6 * (step + 1)
    assert np.array_equal(pseudo_gradient(once)[1], update)


def test_reset_drops_the_work_and_keeps_the_moments(make_work: MakeWork) -> None:
    work = make_work()
    start = params(work)
    work.step(0, 0, 6)
    moments = [tensor.clone() for _, tensor in work._optimizer._tensors()]
    work.reset()
    assert np.array_equal(params(work), start)
    assert work.samples == 0 and pseudo_gradient(work)[0] == 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(moments, work._optimizer._tensors(), strict=True))
    assert work.rate == RATE


def test_when_memory_runs_out_nothing_is_lost(make_work: MakeWork) -> None:
    roomy, cramped = make_work(), make_work(micro_batch=8, wrap=lambda model: Cramped(model, room=2))
    model: Any = cramped._model
    for step in range(2):
        result = roomy.step(0, step, 9)
        other = cramped.step(0, step, 9)
        assert other.loss == pytest.approx(result.loss, rel=1e-5)
    assert model.calls == [8, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1]
    assert cramped.micro_batch == 2 and cramped.samples == 18
    assert distance(pseudo_gradient(cramped)[1], pseudo_gradient(roomy)[1]) < 1e-5


def test_a_step_that_does_not_fit_is_no_step(make_work: MakeWork) -> None:
    work = make_work(wrap=lambda model: Cramped(model, room=4))
    twin = make_work()
    work.step(0, 0, 6)
    twin.step(0, 0, 6)
    before, model = params(work), work._model
    real = model.forward

    def fails_late(input_ids: torch.Tensor, use_cache: bool) -> Any:
        model.room = 4 if len(model.calls) < 3 else 0
        return real(input_ids=input_ids, use_cache=use_cache)

    model.forward = fails_late  # after a micro-batch of the step fitted
    with pytest.raises(WorkerError, match="One sample of 16 tokens does not fit"):
        work.step(0, 1, 6)
    assert len(model.calls) > 3 and np.array_equal(params(work), before)
    assert work.samples == 6
    model.forward = real
    model.room = 4
    work.micro_batch = 4
    work.step(0, 1, 6)
    twin.step(0, 1, 6)
    assert np.array_equal(params(work), params(twin)), "nothing of the failed step is in the next one"


def test_the_micro_batch_is_found_beside_the_moments(make_work: MakeWork) -> None:
    work = make_work(micro_batch=99, wrap=lambda model: Cramped(model, room=3))
    start = params(work)
    found = work.find_micro_batch(limit=8)
    assert found == work.micro_batch <= 2
    assert work.samples == 0 and np.array_equal(params(work), start)


def test_what_is_not_finite_never_leaves(make_work: MakeWork) -> None:
    work, twin = make_work(), make_work()
    start = params(work)
    with torch.no_grad():
        next(work._model.parameters())[:] = float("nan")
    work.step(0, 0, 4)
    with pytest.raises(WorkerError, match="not finite") as caught:
        pseudo_gradient(work)
    assert "\n" not in str(caught.value)
    assert work.samples == 0 and np.array_equal(params(work), start)
    work.begin(start, RATE)
    work.step(0, 0, 4)
    twin.step(0, 0, 4)
    assert np.array_equal(params(work), params(twin)), "the moments were fresh"


def test_vectors_that_do_not_fit_are_refused(make_work: MakeWork) -> None:
    work = make_work()
    size = work._layout.size
    before = params(work)
    for vector in (np.zeros(size + 1, FLOAT), np.zeros(size), np.zeros((1, size), FLOAT)):
        for call in (lambda v: work.begin(v, RATE), work.finish, work.land, lambda v: work.land(v, None, 0.5)):
            with pytest.raises(StateError, match=f"must be float32 of shape .{size},"):
                call(vector)
    with pytest.raises(StateError, match=r"elements 5 to 9 is .*must be float32 of shape .4,"):
        work.land(np.zeros(5, FLOAT), (5, 9))
    assert np.array_equal(params(work), before)


def test_other_parameters_stand_in_for_a_while(make_work: MakeWork) -> None:
    work, twin = make_work(), make_work()
    for one in (work, twin):
        one.step(0, 0, 6)
    shared = moved(params(work), 1)
    with pytest.raises(RuntimeError, match="evaluation"):
        with work.aside(shared):
            assert np.array_equal(params(work), shared)
            raise RuntimeError("an evaluation that fails")
    for one in (work, twin):
        one.step(0, 1, 6)
    assert np.array_equal(pseudo_gradient(work)[1], pseudo_gradient(twin)[1])


@pytest.mark.parametrize("settings", [SETTINGS, MUON], ids=["adamw", "muon"])
def test_a_stop_changes_nothing(
    make_work: MakeWork, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: OptimizerSection
) -> None:
    through, stopped = make_work(settings), make_work(settings)
    for work in (through, stopped):
        work.step(0, 0, 6)
        work.step(0, 1, 6)
    stopped.save(tmp_path / "moments")
    after = make_work(settings)
    with caplog.at_level(logging.WARNING):
        assert after.load(tmp_path / "moments")
    assert not caplog.records
    start = params(through)
    for work in (through, after):
        work.begin(start, RATE)
        work.step(1, 0, 6)
    assert np.array_equal(params(through), params(after))
    after.run_id = "another run"
    assert not after.load(tmp_path / "moments")
