"""Chunk plans: what they cover, their digests, and which bytes are no plan."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import LARGE, LAYOUT, TINY, chunks_in, state_of

from p2pllm.errors import StateError
from p2pllm.state import CHUNK_BYTES, FLOAT, ChunkPlan, Layout, SharedState, chunk_count, chunk_of

LARGE_STATE = state_of(3, LARGE)
PLAN = ChunkPlan.of(state_of(3))
PACKED = PLAN.pack()


@given(st.integers(0, 3 * CHUNK_BYTES // 4 + 2))
def test_chunks_cover_every_vector_once_and_never_two_of_them(size: int) -> None:
    layout = Layout.of([("a", (size,))])
    covered = [0, 0, 0]
    at = 0
    for index in range(chunk_count(layout)):
        chunk = chunk_of(layout, index)
        assert chunk.start == covered[chunk.vector] and chunk.at == at
        assert 0 < chunk.size <= CHUNK_BYTES
        assert chunk.size == CHUNK_BYTES or chunk.stop == layout.nbytes, "only the last one of a vector is short"
        covered[chunk.vector] = chunk.stop
        at += chunk.size
    assert covered == [layout.nbytes] * 3


@pytest.mark.parametrize("index", [-1, 9, 10**9])
def test_there_is_no_other_chunk(index: int) -> None:
    with pytest.raises(StateError, match="no chunk"):
        chunk_of(LARGE, index)


@pytest.mark.parametrize("layout", [TINY, LARGE, Layout.of([])])
def test_a_plan_comes_back_and_has_the_digest_of_the_state(layout: Layout) -> None:
    state = state_of(3, layout)
    plan = ChunkPlan.unpack(ChunkPlan.of(state).pack(), layout)
    assert plan == ChunkPlan.of(state)
    assert plan.digest.hex() == state.digest()
    assert plan.round == 3
    assert [plan.fits(index, data) for index, data in enumerate(chunks_in(state))] == [True] * chunk_count(layout)


@given(st.integers(0, 8), st.integers(0, 7), st.floats(0, 0.999999))
@settings(deadline=None)
def test_a_flipped_bit_fits_nowhere(index: int, bit: int, place: float) -> None:
    plan, data = ChunkPlan.of(LARGE_STATE), bytearray(chunks_in(LARGE_STATE)[index])
    data[int(place * len(data))] ^= 1 << bit
    assert not any(plan.fits(number, data) for number in range(-1, 11))


def test_a_chunk_fits_in_its_own_place_only() -> None:
    plan, chunks = ChunkPlan.of(LARGE_STATE), chunks_in(LARGE_STATE)
    for index, data in enumerate(chunks):
        assert [plan.fits(number, data) for number in range(9)] == [number == index for number in range(9)]
        assert not plan.fits(index, data[:-1]) and not plan.fits(index, data + b"\0")
    assert not plan.fits(-1, chunks[-1]) and not plan.fits(9, b"")


@given(st.data())
def test_a_change_anywhere_is_refused_or_another_digest(data: st.DataObject) -> None:
    """A plan is only as good as its digest: no two packed forms have the same one."""
    raw = bytearray(PACKED)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        plan = ChunkPlan.unpack(bytes(raw), LAYOUT)
    except StateError:
        return
    assert plan.digest != PLAN.digest


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    refuse(data)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=99),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(plain, plain)
def test_hostile_msgpack_is_refused(header: Any, digests: Any) -> None:
    refuse(msgpack.packb([header, digests]))
    refuse(msgpack.packb([header, b"".join(PLAN.digests)]))
    refuse(msgpack.packb([PLAN.header, digests]))
    refuse(msgpack.packb(header))


HEADER = dict(sorted(PLAN.header.items()))
DIGESTS = b"".join(PLAN.digests)


@pytest.mark.parametrize(
    "values",
    [
        [HEADER, DIGESTS[:-1]],
        [HEADER, DIGESTS[:-32]],
        [HEADER, DIGESTS + bytes(32)],
        [HEADER, list(PLAN.digests)],
        [HEADER, DIGESTS, 1],
        [HEADER],
        [{**HEADER, "round": -1}, DIGESTS],
        [{**HEADER, "round": True}, DIGESTS],
        [{**HEADER, "more": "0.5"}, DIGESTS],
        [{**HEADER, "more": 1}, DIGESTS],
        [dict(reversed(HEADER.items())), DIGESTS],
    ],
)
def test_other_contents_are_refused(values: list[Any]) -> None:
    refuse(msgpack.packb(values))


def test_other_sizes_and_layouts_are_refused() -> None:
    refuse(PACKED + b"\0")
    refuse(PACKED[:-1])
    with pytest.raises(StateError, match="has 1000000 bytes"):  # before the parser sees it
        ChunkPlan.unpack(bytes(10**6), LAYOUT)
    refuse(b"\x91" * 500)  # deeper than the parser goes
    with pytest.raises(StateError, match="another layout"):
        ChunkPlan.unpack(PACKED, Layout.of([("other", (LAYOUT.size,))]))
    with pytest.raises(StateError, match="9 digests"):
        ChunkPlan.unpack(PACKED, LARGE)


def test_a_state_without_parameters_has_a_digest() -> None:
    empty = SharedState.initial(Layout.of([]), np.empty(0, FLOAT))
    assert chunk_count(empty.layout) == 0
    assert len(empty.digest()) == 64


def refuse(data: bytes) -> None:
    with pytest.raises(StateError):
        ChunkPlan.unpack(data, LAYOUT)
