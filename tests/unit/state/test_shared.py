"""The shared state: its digest, and what is refused from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import StateError
from p2pllm.state import FLOAT, Layout, SharedState

LAYOUT = Layout.of([("weight", (3, 4)), ("bias", (4,))])


def example() -> SharedState:
    values = np.arange(LAYOUT.size, dtype=FLOAT) / 7
    return SharedState(LAYOUT, values - 1, -values, values * values, round=3, beta_powers=(0.9**3, 0.95**3))


def test_the_digest_never_changes() -> None:
    """Peers of different versions compare it; a new value here is a new format of runs."""
    layout = Layout.of([("a", (2,))])
    state = SharedState.initial(layout, np.array([1.0, -2.0], FLOAT))
    assert state.digest() == "c2f85c40e2a1e051d3727313d3b6b8900aa4da26313a254db119e0d0d1503872"


def test_every_part_is_in_the_digest() -> None:
    digests = {example().digest()}
    for name in ("params", "m", "v"):
        state = example()
        getattr(state, name)[5] = np.nextafter(getattr(state, name)[5], np.float32(9))
        digests.add(state.digest())
    for name, value in (("round", 4), ("beta1_power", 0.5), ("beta2_power", 0.5)):
        state = example()
        setattr(state, name, value)
        digests.add(state.digest())
    assert len(digests) == 7


@pytest.mark.parametrize("size", [1, 262_144, 262_145, 600_000])
def test_the_digest_is_that_of_the_list_of_chunks(size: int) -> None:
    """Written out here once more: other programs must be able to check it, however many threads hash."""
    layout = Layout.of([("a", (size,))])
    state = SharedState.initial(layout, np.arange(size, dtype=FLOAT))
    digests = b""
    for vector in map(bytes, state.payload()):
        digests += b"".join(blake3(vector[at : at + 1_048_576]).digest() for at in range(0, len(vector), 1_048_576))
    header = f"beta1_power={(1.0).hex()}\nbeta2_power={(1.0).hex()}\nlayout={layout.digest()}\nround=0\n"
    assert state.digest() == blake3(b"p2pllm state 2\n" + header.encode() + digests).hexdigest()


def test_vectors_are_adopted_without_copies() -> None:
    state = example()
    vectors = [vector.copy() for vector in (state.params, state.m, state.v)]
    adopted = SharedState.adopt(LAYOUT, state.header(), vectors)
    assert adopted.digest() == state.digest()
    assert [adopted.params is vectors[0], adopted.m is vectors[1], adopted.v is vectors[2]] == [True] * 3
    vectors[2][1] = -1
    with pytest.raises(StateError, match="negative"):
        SharedState.adopt(LAYOUT, state.header(), vectors)
    with pytest.raises(StateError, match="another layout"):
        SharedState.adopt(LAYOUT, {**state.header(), "layout": "0" * 64}, vectors)


def test_parameters_move_to_memory_that_fits() -> None:
    state, out = example(), np.zeros(LAYOUT.size, FLOAT)
    with pytest.raises(StateError, match="params"):
        state.move_params(out[:-1])
    state.move_params(out)
    assert state.params is out and state.digest() == example().digest()


def test_a_payload_comes_back_bit_for_bit_into_the_given_buffer() -> None:
    state = example()
    out = np.full(LAYOUT.size, 7, FLOAT)
    buffers = [bytes(part) for part in state.payload()]
    copy = SharedState.from_payload(LAYOUT, state.header(), buffers, out)
    assert copy.params is out
    assert copy.digest() == state.digest()
    copy.m[0] = 1  # read-only sources must not make read-only states


@given(st.integers(0, 2), st.integers(0, LAYOUT.size - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_numbers_that_are_not_finite_are_refused(which: int, at: int, value: float) -> None:
    state = example()
    (state.params, state.m, state.v)[which][at] = value
    refuse(state.header(), state.payload(), "not finite")


def test_a_negative_second_moment_is_refused() -> None:
    state = example()
    state.v[3] = -1
    refuse(state.header(), state.payload(), "negative")


@pytest.mark.parametrize(
    "buffers",
    [
        None,
        [],
        [b"", b"", b""],
        [bytes(4 * LAYOUT.size)] * 2,
        [bytes(4 * LAYOUT.size)] * 4,
        [bytes(4 * LAYOUT.size)] * 2 + [bytes(4 * LAYOUT.size - 1)],
        [bytes(4 * LAYOUT.size)] * 2 + ["x" * 4 * LAYOUT.size],
        [bytes(4 * LAYOUT.size)] * 2 + [None],
    ],
)
def test_buffers_of_another_size_or_type_are_refused(buffers: Any) -> None:
    refuse(example().header(), buffers)


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"round": "3"},
        {"round": True},
        {"round": 3.0},
        {"round": 10**10},
        {"round": 0},
        {"layout": "0" * 64},
        {"beta1_power": 0.5},
        {"beta1_power": "nan"},
        {"beta1_power": "0.5"},
        {"beta1_power": "0x1.0p+1"},
        {"beta2_power": "-0x1.0p-1"},
        {"beta2_power": "0x1p-1"},
        {"beta2_power": "x" * 1000},
        {"beta2_power": None},
        {"more": 1},
    ],
)
def test_headers_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    refuse({**example().header(), **change}, example().payload())


def test_a_header_that_is_no_mapping_is_refused() -> None:
    refuse([1, 2], example().payload(), "header")
    refuse({}, example().payload(), "header")


def test_arrays_that_do_not_fit_are_refused() -> None:
    good = np.zeros(LAYOUT.size, FLOAT)
    read_only = good.copy()
    read_only.flags.writeable = False
    bad = (good.astype(np.float64), good[:-1], np.zeros(2 * LAYOUT.size, FLOAT)[::2], read_only, [0.0])
    for array in bad:
        with pytest.raises(StateError, match="params"):
            SharedState.initial(LAYOUT, array)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="not finite"):
        SharedState.initial(LAYOUT, np.full(LAYOUT.size, np.nan, FLOAT))


def refuse(header: Any, buffers: Any, match: str | None = None) -> None:
    """It must not be adopted, not even in part."""
    out = np.full(LAYOUT.size, 7, FLOAT)
    with pytest.raises(StateError, match=match):
        SharedState.from_payload(LAYOUT, header, buffers, out)
    assert (out == 7).all()
