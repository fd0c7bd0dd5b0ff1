"""Fragments in a peer's inner work: each is handed over in its turn, lands merged, and keeps what was done to it."""

from __future__ import annotations

import numpy as np
import pytest
from local_work import CPU, RATE

from p2pllm.manifest import RunDraft
from p2pllm.state import FLOAT, span_of
from p2pllm.training.data import Corpus
from p2pllm.training.model import build, read_params
from p2pllm.training.tokenizer import ByteTokenizer
from p2pllm.training.work import Local

PARTS = 3
SHARE = 0.25


@pytest.fixture
def work(draft: RunDraft, tokenizer: ByteTokenizer, corpus: Corpus) -> Local:
    section = {"strategy": "diloco", "overlap": True, "fragments": PARTS, "own_share": SHARE}
    optimizer = {"batch": 4, "learning_rate": RATE, "warmup_rounds": 0}
    cut = RunDraft.model_validate(draft.model_dump(exclude_unset=True) | {"round": section, "optimizer": optimizer})
    made = Local(cut, build(cut, tokenizer), corpus, CPU, 4)
    made.draw_for("run", "peer")
    made.begin(params(made), 0)
    return made


def params(work: Local) -> np.ndarray:
    out = np.empty(work._steps.size, FLOAT)
    read_params(work._steps._model, out)
    return out


def round_of(work: Local, number: int) -> tuple[int, np.ndarray]:
    """Two steps, and what is handed over: (samples, vector)."""
    for step in range(2):
        work.step(number, step)
    out = np.full(work._steps.size, np.nan, FLOAT)
    elements, samples = work.finish(out)
    assert np.isnan(out[elements:]).all(), "the rest is not touched"
    return samples, out[:elements]


def test_each_round_hands_over_what_was_done_to_its_fragment_since_it_last_landed(work: Local) -> None:
    start = params(work)
    for number in range(PARTS):
        samples, update = round_of(work, number)
        first, last = span_of(start.size, PARTS, number)
        assert samples == 8, "of this round alone"
        assert np.array_equal(update, (start - params(work))[first:last])
        assert np.count_nonzero(update) > update.size / 2
        work.go_on(number + 1)
        assert work.samples == 0


def test_a_fragment_lands_in_the_mean_with_our_own_and_the_others_stay(work: Local) -> None:
    round_of(work, 0)
    work.go_on(1)
    work.step(1, 0)
    before, shared = params(work), np.zeros(work._steps.size, FLOAT)
    work.land(shared, 1)
    first, last = span_of(before.size, PARTS, 0)
    assert np.allclose(params(work)[first:last], SHARE * before[first:last])
    assert np.array_equal(params(work)[last:], before[last:])


def test_all_land_that_moved_while_we_were_left_behind(work: Local) -> None:
    round_of(work, 0)
    work.go_on(1)
    before, shared = params(work), np.zeros(work._steps.size, FLOAT)
    work.land(shared, 2)
    last = span_of(before.size, PARTS, 1)[1]
    assert np.allclose(params(work)[:last], SHARE * before[:last])
    assert np.array_equal(params(work)[last:], before[last:])
    samples, update = round_of(work, 2)
    assert samples == 8 and update.size == before.size - last
    work.go_on(3)
    work.land(shared, 3 + 10 * PARTS)
    assert np.abs(params(work)).max() < np.abs(before).max(), "more rounds than fragments: each once"
