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
    return SharedState(LAYOUT, [values - 1, -values, values * values], round=3)


def test_the_digest_never_changes() -> None:
    """Peers of different versions compare it; a new value here is a new format of runs."""
    layout = Layout.of([("a", (2,))])
    state = SharedState.initial(layout, np.array([1.0, -2.0], FLOAT))
    assert state.digest() == "66237926c31116a336065083533544ddda86003bb59371d3e2cd351e2b3c87b6"


def test_every_part_is_in_the_digest() -> None:
    digests = {example().digest()}
    for which in range(3):
        state = example()
        state.vectors[which][5] = np.nextafter(state.vectors[which][5], np.float32(9))
        digests.add(state.digest())
    state = example()
    state.round = 4
    digests.add(state.digest())
    values = example()
    digests.add(SharedState(LAYOUT.with_moments(("v", "m")), values.vectors, round=3).digest())
    digests.add(SharedState(LAYOUT.with_moments(("m",)), values.vectors[:2], round=3).digest())
    digests.add(SharedState(LAYOUT.with_moments(()), values.vectors[:1], round=3).digest())
    assert len(digests) == 8


@pytest.mark.parametrize("size", [1, 262_144, 262_145, 600_000])
def test_the_digest_is_that_of_the_list_of_chunks(size: int) -> None:
    """Written out here once more: other programs must be able to check it, however many threads hash."""
    layout = Layout.of([("a", (size,))])
    state = SharedState.initial(layout, np.arange(size, dtype=FLOAT))
    digests = b""
    for vector in map(bytes, state.payload()):
        digests += b"".join(blake3(vector[at : at + 1_048_576]).digest() for at in range(0, len(vector), 1_048_576))
    header = f"p2pllm state 3\nparams m v\nlayout={layout.digest()}\nround=0\n"
    assert state.digest() == blake3(header.encode() + digests).hexdigest()


def test_vectors_are_adopted_without_copies() -> None:
    state = example()
    vectors = [vector.copy() for vector in state.vectors]
    adopted = SharedState.adopt(LAYOUT, state.header(), vectors)
    assert adopted.digest() == state.digest()
    assert all(mine is given for mine, given in zip(adopted.vectors, vectors, strict=True))
    vectors[2][1] = -1
    with pytest.raises(StateError, match="negative"):
        SharedState.adopt(LAYOUT, state.header(), vectors)
    with pytest.raises(StateError, match="another layout"):
        SharedState.adopt(LAYOUT, {**state.header(), "layout": "0" * 64}, vectors)


def test_a_copy_has_memory_of_its_own() -> None:
    state, copy = example(), SharedState.initial(LAYOUT, np.zeros(LAYOUT.size, FLOAT))
    copy.copy_from(state)
    assert copy.digest() == state.digest()
    assert not any(np.may_share_memory(mine, its) for mine, its in zip(copy.vectors, state.vectors, strict=True))


@given(st.integers(0, 2), st.integers(0, LAYOUT.size - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_numbers_that_are_not_finite_are_refused(which: int, at: int, value: float) -> None:
    state = example()
    state.vectors[which][at] = value
    refuse(state.header(), state.vectors, "not finite")


def test_a_negative_second_moment_is_refused() -> None:
    state = example()
    state.moments["v"][3] = -1
    refuse(state.header(), state.vectors, "negative")


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"round": "3"},
        {"round": True},
        {"round": 3.0},
        {"round": 10**10},
        {"layout": "0" * 64},
        {"more": 1},
    ],
)
def test_headers_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    refuse({**example().header(), **change}, example().vectors)


def test_a_header_that_is_no_mapping_is_refused() -> None:
    refuse([1, 2], example().vectors, "header")
    refuse({}, example().vectors, "header")


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


def refuse(header: Any, vectors: list[np.ndarray], match: str | None = None) -> None:
    with pytest.raises(StateError, match=match):
        SharedState.adopt(LAYOUT, header, vectors)
