"""Codecs: exact lengths, clipping, rounding, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from p2pllm.averaging import Group, codec
from p2pllm.averaging.codecs import BLOCK

finite = hnp.arrays(np.float32, st.integers(0, 70), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(deadline=None)  # the first example imports torch
@given(finite)
def test_fp32_is_exact(values: np.ndarray) -> None:
    data = codec("fp32").encode(values)
    out = np.full_like(values, 7)
    codec("fp32").decode(data, out)
    np.testing.assert_array_equal(out.view(np.uint32), values.view(np.uint32))


@settings(deadline=None)  # the first example imports torch
@given(finite)
def test_fp16_rounds_and_clips(values: np.ndarray) -> None:
    data = codec("fp16").encode(values)
    out = np.empty_like(values)
    codec("fp16").decode(bytes(data), out)
    assert np.isfinite(out).all()
    expected = np.clip(values.astype(np.float64), -65504, 65504)
    # Half a unit in the last place: relative 2**-11, or half of the smallest subnormal.
    assert (np.abs(out - expected) <= np.maximum(np.abs(expected) * 2.0**-11, 2.0**-25)).all()


@settings(deadline=None)  # the first example imports torch
@given(finite)
def test_fp16_decoded_values_encode_to_themselves(values: np.ndarray) -> None:
    once = codec("fp16").encode(values)
    out = np.empty_like(values)
    codec("fp16").decode(once, out)
    assert bytes(codec("fp16").encode(out)) == bytes(once)


@settings(deadline=None)  # the first example imports torch
@given(finite)
def test_bf16_rounds_to_eight_bits(values: np.ndarray) -> None:
    out = np.empty_like(values)
    codec("bf16").decode(bytes(codec("bf16").encode(values)), out)
    assert np.isfinite(out).all()
    assert (np.abs(out.astype(np.float64) - values) <= np.maximum(np.abs(values) * 2.0**-8, 2.0**-134)).all()


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_int8_is_off_by_half_a_step_of_its_block(values: np.ndarray) -> None:
    data = codec("int8").encode(values)
    out = np.full_like(values, np.nan)
    codec("int8").decode(bytes(data), out)
    for start in range(0, values.size, BLOCK):
        block = slice(start, start + BLOCK)
        step = np.abs(values[block]).max(initial=0.0) / 127
        # the steps of a block of the smallest numbers are as coarse as these are
        assert (np.abs(out[block].astype(np.float64) - values[block]) <= 0.501 * step + 127 * 1.5e-45).all()


def test_int8_takes_a_little_more_than_a_byte() -> None:
    assert codec("int8").bytes_for(6400) == 6400 + 4 * 100
    assert codec("int8").bytes_for(65) == 65 + 8


def test_blocks_stay_whole_wherever_a_vector_is_cut() -> None:
    values = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    whole, cut = np.empty_like(values), np.empty_like(values)
    codec("int8").decode(codec("int8").encode(values), whole)
    group = Group(bytes(32), ("a", "b", "c"), (1.0,) * 3, values.size, "int8")
    for member in range(3):
        for part in group.parts(member, 3 * BLOCK):
            codec("int8").decode(codec("int8").encode(values[part]), cut[part])
    np.testing.assert_array_equal(whole, cut)


def test_what_nobody_encodes_is_not_finite_rather_than_wrong() -> None:
    """The all-reduce then blames who sent it."""
    out = np.empty(2, np.float32)
    codec("int8").decode(np.array([3e38], "<f4").tobytes() + bytes([127, 1]), out)
    assert np.isinf(out[0]) and np.isfinite(out[1])


def test_fp16_shows_nan() -> None:
    out = np.empty(2, np.float32)
    codec("fp16").decode(codec("fp16").encode(np.array([np.nan, 1], np.float32)), out)
    assert np.isnan(out[0])


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("wrong", [-4, -1, 1, 2, 4])
def test_decode_takes_the_exact_length_only(name: str, wrong: int) -> None:
    data = bytes(codec(name).bytes_for(5) + wrong)
    with pytest.raises(ValueError, match="5"):
        codec(name).decode(data, np.empty(5, np.float32))


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8"])
def test_bytes_for_is_what_encode_gives(name: str) -> None:
    for count in (0, 1, 64, 1000):
        assert len(codec(name).encode(np.ones(count, np.float32))) == codec(name).bytes_for(count)


def test_unknown_codec() -> None:
    with pytest.raises(ValueError, match="zip"):
        codec("zip")
