"""The mean of sparse updates: against exact fractions, in the given order, with norms brought down to the median."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.averaging.sparse import SparseUpdate
from p2pllm.averaging.sparse_mean import sparse_mean

SIZE = 40


def update_of(values: dict[int, float]) -> SparseUpdate:
    positions = sorted(values)
    return SparseUpdate(np.array(positions, np.int64), np.array([values[at] for at in positions], np.float32))


updates = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, SIZE - 1), st.floats(-100, 100, width=16), max_size=SIZE), st.integers(1, 5000)
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=80)
@given(updates, st.sampled_from(["all", "senders"]))
def test_is_the_mean_of_scaled_updates(members: list[tuple[dict[int, float], int]], divide_by: str) -> None:
    norms = sorted(math.sqrt(sum(value**2 for value in values.values())) for values, _ in members)
    median = (norms[(len(norms) - 1) // 2] + norms[len(norms) // 2]) / 2
    expected = np.zeros(SIZE)
    for at in range(SIZE):
        sender_weight, sum_ = 0, Fraction(0)
        for values, weight in members:
            norm = math.sqrt(sum(value**2 for value in values.values()))
            if at in values:
                sender_weight += weight
                sum_ += weight * Fraction(values[at]) * Fraction(min(1.0, median / norm) if norm else 1.0)
        divisor = sum(weight for _, weight in members) if divide_by == "all" else sender_weight
        expected[at] = float(sum_ / divisor) if divisor else 0.0
    mean = sparse_mean(
        [update_of(values) for values, _ in members], [weight for _, weight in members], SIZE, divide_by=divide_by
    )
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, rtol=2e-6, atol=2e-5)


def test_members_with_equal_norms_are_only_averaged() -> None:
    one, other = update_of({0: 2.0, 5: 1.0}), update_of({0: 1.0, 7: -2.0})
    shared = sparse_mean([one, other], [3, 1], 8, divide_by="all")
    assert shared.tolist() == [1.75, 0, 0, 0, 0, 0.75, 0, -0.5]
    senders = sparse_mean([one, other], [3, 1], 8, divide_by="senders")
    assert senders.tolist() == [1.75, 0, 0, 0, 0, 1.0, 0, -2.0]


def test_one_member_with_huge_numbers_does_not_outweigh_others() -> None:
    honest = [update_of({1: 3.0, 2: 4.0}), update_of({1: 3.0, 2: 4.0})]
    loud = update_of({7: 60000.0})
    mean = sparse_mean([*honest, loud], [1, 1, 1], 8, divide_by="all")
    assert mean[7] == pytest.approx(5 / 3)
    assert mean[2] == pytest.approx(8 / 3)


def test_updates_are_left_as_they_are() -> None:
    members = [update_of({1: 3.0}), update_of({1: 30.0, 3: 1.0})]
    before = [update.values.copy() for update in members]
    sparse_mean(members, [1, 2], 8, divide_by="senders")
    for update, values in zip(members, before, strict=True):
        np.testing.assert_array_equal(update.values, values)


def test_updates_of_nothing() -> None:
    for divide_by in ("all", "senders"):
        assert sparse_mean([update_of({})], [1], 3, divide_by=divide_by).tolist() == [0, 0, 0]
        assert sparse_mean([update_of({0: 0.0})], [1], 1, divide_by=divide_by).tolist() == [0]


@pytest.mark.parametrize("divide_by, digest", [("all", "807de32255e1f63d"), ("senders", "52fd0c9bc794fa08")])
def test_bits_are_as_recorded(divide_by: str, digest: str) -> None:
    """Peers that differ in one bit here part ways for good."""
    members = []
    for seed in range(1, 6):
        whole = np.arange(1, 40_001, dtype=np.int64) * (2654435761 * seed) % 16777213
        values = np.ldexp((whole - 8388606).astype(np.float32), (-20 - seed - whole % 7).astype(np.int32))
        members.append(SparseUpdate(np.arange(40_000, dtype=np.int64) * 5 + whole % 5, values.astype(np.float32)))
    mean = sparse_mean(members, [7, 1, 12, 3, 40], 200_000, divide_by=divide_by)
    assert blake3(mean.astype("<f4").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "members, weights, sentence",
    [
        ([], [], "0 sparse updates"),
        ([update_of({1: 1.0})], [1, 2], "1 sparse updates to average and 2 weights"),
        ([update_of({1: 1.0})], [0], "weight"),
        ([update_of({1: 1.0})], [2**53 + 1], "weight"),
        ([update_of({8: 1.0})], [1], "not below 8"),
        ([update_of({-1: 1.0, 2: 1.0})], [1], "not below 8"),
    ],
)
def test_refuses(members: list[SparseUpdate], weights: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sparse_mean(members, weights, 8, divide_by="all")
