"""Codecs: exact lengths, clipping, rounding, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from p2pllm.averaging import codec

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


def test_fp16_shows_nan() -> None:
    out = np.empty(2, np.float32)
    codec("fp16").decode(codec("fp16").encode(np.array([np.nan, 1], np.float32)), out)
    assert np.isnan(out[0])


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("wrong", [-4, -1, 1, 2, 4])
def test_decode_takes_the_exact_length_only(name: str, wrong: int) -> None:
    data = bytes(codec(name).bytes_for(5) + wrong)
    with pytest.raises(ValueError, match="5"):
        codec(name).decode(data, np.empty(5, np.float32))


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_bytes_for_is_what_encode_gives(name: str) -> None:
    for count in (0, 1, 64, 1000):
        assert len(codec(name).encode(np.ones(count, np.float32))) == codec(name).bytes_for(count)


def test_unknown_codec() -> None:
    with pytest.raises(ValueError, match="zip"):
        codec("zip")
