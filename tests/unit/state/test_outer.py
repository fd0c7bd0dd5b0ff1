"""The outer optimizer: torch's AdamW up to rounding, and the same bits however it is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import StateError
from p2pllm.sections import OptimizerSection
from p2pllm.state import FLOAT, Layout, SharedState, check_arithmetic, outer
from p2pllm.state.adamw import AdamW, learning_rate
from p2pllm.state.outer import sum_of_squares

LAYOUT = Layout.of([("bias", (7,)), ("weight", (9, 11)), ("deep", (2, 3, 4)), ("gain", (5,))])
SECTION = OptimizerSection(learning_rate=3e-3, warmup_rounds=3, weight_decay=0.3, clip_norm=0.7)
ROUNDS = 12


def test_it_is_torchs_adamw() -> None:
    state = fresh()
    tensors = {name: torch.tensor(view, requires_grad=True) for name, view in LAYOUT.views(state.params).items()}
    groups = [
        {"params": [t for t in tensors.values() if t.dim() >= 2], "weight_decay": SECTION.weight_decay},
        {"params": [t for t in tensors.values() if t.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(SECTION.beta1, SECTION.beta2), eps=SECTION.epsilon, foreach=False)
    ours = AdamW(SECTION, ROUNDS, LAYOUT)
    for round_, gradient in enumerate(gradients()):
        for name, view in LAYOUT.views(gradient.copy()).items():
            tensors[name].grad = torch.tensor(view)
        torch.nn.utils.clip_grad_norm_(tensors.values(), SECTION.clip_norm)
        for group in theirs.param_groups:
            group["lr"] = learning_rate(SECTION, ROUNDS, round_)
        theirs.step()
        ours.step(state, gradient)
    expected = np.concatenate([t.detach().numpy().ravel() for t in tensors.values()])
    np.testing.assert_allclose(state.params, expected, rtol=2e-5, atol=1e-6)
    assert state.round == ROUNDS


@given(block=st.integers(1, 200), shift=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_bits_do_not_depend_on_blocks_or_alignment(block: int, shift: int) -> None:
    expected, moved = fresh(), fresh(shift)
    for gradient in gradients():
        AdamW(SECTION, ROUNDS, LAYOUT).step(expected, gradient)
        AdamW(SECTION, ROUNDS, LAYOUT, block=block).step(moved, misaligned(gradient, shift))
    assert moved.digest() == expected.digest()


def test_the_bits_never_change() -> None:
    """All peers must compute these; a new value here is a new format of runs."""
    state = fresh()
    optimizer = AdamW(SECTION, ROUNDS, LAYOUT)
    for gradient in gradients():
        optimizer.step(state, gradient)
    assert state.digest() == "536b6eb1ea5b0b9507e2066103af12eed2f68657aaf38dc7a8eec0bfebf76da7"


@given(block=st.integers(1, 200), rounds=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_a_step_into_another_state_gives_the_same_bits_and_leaves_the_first(block: int, rounds: int) -> None:
    expected, state, other = fresh(), fresh(), garbage()
    optimizer = AdamW(SECTION, ROUNDS, LAYOUT, block=block)
    for gradient in gradients()[:rounds]:
        before, given = state.digest(), gradient.copy()
        optimizer.step(expected, gradient)
        optimizer.step(state, gradient, into=other)
        assert state.digest() == before
        assert np.array_equal(gradient, given)
        assert other.digest() == expected.digest()
        state, other = other, state


def test_a_bad_gradient_changes_neither_state() -> None:
    state, other = fresh(), garbage()
    vectors = [vector.copy() for vector in other.vectors]
    for gradient in bad_gradients():
        with pytest.raises(StateError, match="averaged update"):
            AdamW(SECTION, ROUNDS, LAYOUT).step(state, gradient, into=other)
    assert state.digest() == fresh().digest()
    for one, two in zip(vectors, other.vectors, strict=True):
        assert np.array_equal(one, two, equal_nan=True)
    assert other.round == 77


def test_a_state_to_write_to_has_the_same_layout_and_its_own_memory() -> None:
    state, optimizer, gradient = fresh(), AdamW(SECTION, ROUNDS, LAYOUT), gradients()[0]
    other = SharedState.initial(Layout.of([("a", (LAYOUT.size,))]), np.zeros(LAYOUT.size, FLOAT))
    with pytest.raises(StateError, match="another layout"):
        optimizer.step(state, gradient, into=other)
    room = np.zeros(2 * LAYOUT.size - 1, FLOAT)
    room[: LAYOUT.size] = state.params
    lapping = SharedState.initial(LAYOUT, room[: LAYOUT.size])
    for into in (
        state,
        SharedState.initial(LAYOUT, state.moments["m"]),
        SharedState.initial(LAYOUT, room[-LAYOUT.size :]),
    ):
        with pytest.raises(StateError, match="shares memory"):
            optimizer.step(lapping if into.params.base is room else state, gradient, into=into)
    assert state.digest() == lapping.digest() == fresh().digest()


def test_only_matrices_decay() -> None:
    section = OptimizerSection(warmup_rounds=0, learning_rate=0.1, weight_decay=0.5)
    state = fresh()
    before = {name: view.copy() for name, view in LAYOUT.views(state.params).items()}
    AdamW(section, 5, LAYOUT).step(state, np.zeros(LAYOUT.size, FLOAT))
    for name, view in LAYOUT.views(state.params).items():
        factor = np.float32(1 - 0.1 * 0.5) if view.ndim >= 2 else np.float32(1)
        assert np.array_equal(view, before[name] * factor)


def test_without_clipping_the_gradient_is_taken_as_it_is() -> None:
    section = OptimizerSection(clip_norm=0, warmup_rounds=0)
    state = fresh()
    AdamW(section, 5, LAYOUT).step(state, np.full(LAYOUT.size, 100, FLOAT))
    np.testing.assert_allclose(state.moments["m"], 100 * (1 - section.beta1), rtol=1e-6)


def bad_gradients() -> list[np.ndarray]:
    nan, inf = np.zeros(LAYOUT.size, FLOAT), np.zeros(LAYOUT.size, FLOAT)
    nan[-1], inf[0] = np.nan, -np.inf
    return [
        nan,
        inf,
        np.zeros(LAYOUT.size),
        np.zeros(LAYOUT.size - 1, FLOAT),
        np.zeros((LAYOUT.size, 1), FLOAT),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_bad_gradient_changes_nothing(which: int) -> None:
    state = fresh()
    before = state.digest()
    with pytest.raises(StateError, match="averaged update"):
        AdamW(SECTION, ROUNDS, LAYOUT).step(state, bad_gradients()[which])
    assert state.digest() == before


def test_a_huge_gradient_does_not_overflow_without_clipping() -> None:
    state = fresh()
    AdamW(OptimizerSection(clip_norm=0), ROUNDS, LAYOUT).step(state, np.full(LAYOUT.size, 1e30, FLOAT))
    assert state.round == fresh().round + 1
    assert all(np.isfinite(vector).all() for vector in state.vectors)


def test_a_processor_that_flushes_small_numbers_is_noticed() -> None:
    state = fresh()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        with pytest.raises(StateError, match="very small numbers as 0"):
            AdamW(SECTION, ROUNDS, LAYOUT).step(state, gradients()[0])
    finally:
        torch.set_flush_denormal(False)
    assert state.digest() == fresh().digest()


def test_a_machine_that_computes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_arithmetic()
    right = outer.sum_of_squares
    monkeypatch.setattr(outer, "sum_of_squares", lambda vector: right(vector) * (1 + 2**-22))
    with pytest.raises(StateError, match="This machine computes the outer step differently from others"):
        check_arithmetic()


def test_a_huge_gradient_is_clipped() -> None:
    state = fresh()
    AdamW(SECTION, ROUNDS, LAYOUT).step(state, np.full(LAYOUT.size, 1e30, FLOAT))
    assert np.isfinite(state.params).all() and np.isfinite(state.moments["v"]).all()


def test_a_state_of_another_layout_is_refused() -> None:
    other = Layout.of([("a", (LAYOUT.size,))])
    with pytest.raises(StateError, match="another layout"):
        AdamW(SECTION, ROUNDS, other).step(fresh(), np.zeros(LAYOUT.size, FLOAT))


@given(st.integers(0, 70_000))
@settings(max_examples=20, deadline=None)
def test_the_sum_of_squares_is_right(size: int) -> None:
    vector = np.random.default_rng(size).standard_normal(size).astype(FLOAT)
    assert sum_of_squares(vector) == pytest.approx(math.fsum(float(x) ** 2 for x in vector), rel=1e-12)


def test_the_schedule() -> None:
    section = OptimizerSection(learning_rate=1.0, warmup_rounds=4, final_fraction=0.1)
    rates = [learning_rate(section, 11, round_) for round_ in range(13)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:11] == pytest.approx([0.85, 0.7, 0.55, 0.4, 0.25, 0.1])
    assert rates[11:] == pytest.approx([0.1, 0.1])


@given(st.integers(0, 20), st.integers(1, 20), st.floats(0, 1))
def test_the_rate_is_positive_until_the_last_round_and_never_above_the_peak(
    warmup: int, rounds: int, final: float
) -> None:
    section = OptimizerSection(learning_rate=0.5, warmup_rounds=warmup, final_fraction=final)
    for round_ in range(rounds):
        rate = learning_rate(section, rounds, round_)
        assert 0 <= rate <= 0.5
        assert rate > 0 or round_ == rounds - 1


def fresh(shift: int = 0) -> SharedState:
    # integers over a power of two: normal draws go through libm, and would differ between machines
    params = (np.random.default_rng(1).integers(-4096, 4096, LAYOUT.size) / 2048).astype(FLOAT)
    return SharedState.initial(LAYOUT, misaligned(params, shift))


def garbage() -> SharedState:
    """A state to be written to; nothing that is in it may matter."""
    vectors = (np.full(LAYOUT.size, np.nan, FLOAT) for _ in range(3))
    return SharedState(LAYOUT, list(vectors), round=77)


def gradients() -> list[np.ndarray]:
    random = np.random.default_rng(2)
    # some above the norm at which they are clipped, some below
    return [(random.integers(-4096, 4096, LAYOUT.size) * scale).astype(FLOAT) for scale in [2**-12, 2**-18, 2**-32] * 4]


def misaligned(values: np.ndarray, shift: int) -> np.ndarray:
    """A copy that starts `shift` elements after an aligned address."""
    room = np.empty(len(values) + shift, FLOAT)
    room[shift:] = values
    return room[shift:]
