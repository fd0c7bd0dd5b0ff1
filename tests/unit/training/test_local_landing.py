"""Local steps while updates travel: a new start lands below them, whole, by fragments, or merged."""

from __future__ import annotations

import numpy as np
import pytest
from local_work import RATE, MakeWork, moved, params, pseudo_gradient


def test_an_update_that_travels_takes_no_step_away(make_work: MakeWork) -> None:
    """The pseudo-gradient after landing is what the steps since go_on did, before and after it."""
    work = make_work()
    work.step(0, 0, 6)
    left = params(work)
    work.go_on(RATE)
    assert work.samples == 0 and not pseudo_gradient(work)[1].any()
    work.step(1, 0, 6)
    samples, update = pseudo_gradient(work)
    assert samples == 6 and np.array_equal(update, left - params(work))
    landed = moved(left, 1)
    work.land(landed)
    assert work.samples == 6
    assert np.abs(pseudo_gradient(work)[1] - update).max() < 1e-7
    assert np.abs(params(work) - (landed - update)).max() < 1e-7
    before = params(work)
    work.step(1, 1, 6)
    samples, both = pseudo_gradient(work)
    assert samples == 12
    assert np.abs(both - (update + (before - params(work)))).max() < 1e-7
    work.reset()
    assert np.array_equal(params(work), landed), "the new start is the start"


def test_landing_where_no_step_was_taken_is_exact(make_work: MakeWork) -> None:
    work = make_work()
    work.step(0, 0, 6)
    work.go_on(RATE)
    landed = moved(params(work), 1)
    work.land(landed)
    assert np.array_equal(params(work), landed)
    assert not pseudo_gradient(work)[1].any()


def test_fragments_land_one_by_one_as_the_whole_does(make_work: MakeWork) -> None:
    """Borders need not be those of parameters."""
    whole, cut = make_work(), make_work()
    size = whole._layout.size
    spans = [(0, 1000), (1000, 1001), (1001, size // 2), (size // 2, size)]
    for work in (whole, cut):
        work.step(0, 0, 6)
        work.step(0, 1, 5)
    samples, update = pseudo_gradient(whole)
    parts = [pseudo_gradient(cut, span) for span in spans]
    assert [count for count, _ in parts] == [samples] * 4
    assert np.array_equal(np.concatenate([part for _, part in parts]), update)
    whole.go_on(RATE)
    for span in spans:
        cut.go_on(RATE, span)
    for work in (whole, cut):
        work.step(1, 0, 3)
    landed = moved(params(whole), 1)
    whole.land(landed)
    for span in spans:
        cut.land(landed[slice(*span)], span)
    assert np.array_equal(params(whole), params(cut))
    assert np.array_equal(pseudo_gradient(whole)[1], pseudo_gradient(cut)[1])
    assert [pseudo_gradient(cut, span)[0] for span in spans] == [3] * 4 and pseudo_gradient(whole)[0] == 3


def test_a_fragment_leaves_the_others_alone(make_work: MakeWork) -> None:
    work = make_work()
    span, rest = (500, 3000), (3000, work._layout.size)
    work.step(0, 0, 6)
    before, update = params(work), pseudo_gradient(work)[1]
    work.go_on(RATE, span)
    landed = moved(before, 1)
    work.land(landed[500:3000], span)
    after = params(work)
    assert np.array_equal(after[500:3000], landed[500:3000])
    assert np.array_equal(after[:500], before[:500]) and np.array_equal(after[3000:], before[3000:])
    work.step(0, 1, 4)
    (samples, of_span), (older, of_rest) = pseudo_gradient(work, span), pseudo_gradient(work, rest)
    assert (samples, older) == (4, 10)
    second = after - params(work)
    assert np.array_equal(of_span, second[500:3000])
    assert np.abs(of_rest - (update + second)[3000:]).max() < 2e-7
    work.begin(landed, RATE)
    assert pseudo_gradient(work, span)[0] == work.samples == 0


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("span", [None, (40, 5000)])
def test_merging_is_the_mean_of_local_and_new(make_work: MakeWork, alpha: float, span: tuple[int, int] | None) -> None:
    work = make_work()
    work.step(0, 0, 6)
    local = params(work)
    new = moved(local, 1)
    part = slice(*span) if span else slice(None)
    work.land(new[part], span, alpha)
    expected = local.copy()
    expected[part] = alpha * local[part] + (1 - alpha) * new[part]
    assert params(work) == pytest.approx(expected, rel=2e-7, abs=1e-8)
    assert np.array_equal(pseudo_gradient(work, span)[1], new[part] - params(work)[part]), "the new one is the start"
    if alpha == 0.0:
        assert np.array_equal(params(work)[part], new[part])
