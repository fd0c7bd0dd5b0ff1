"""Layouts: offsets, views, JSON."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import StateError
from p2pllm.state import Layout

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=6)


@given(shapes)
def test_views_cover_the_vector_once(all_shapes: list[tuple[int, ...]]) -> None:
    layout = Layout.of((f"p{i}", shape) for i, shape in enumerate(all_shapes))
    flat = np.arange(layout.size, dtype=np.float32)
    assert flat.nbytes == layout.nbytes
    views = layout.views(flat)
    assert [view.shape for view in views.values()] == all_shapes
    joined = np.concatenate([view.ravel() for view in views.values()]) if views else flat
    assert np.array_equal(joined, flat)
    assert all(np.shares_memory(view, flat) for view in views.values() if view.size)
    assert Layout.from_json(layout.to_json()) == layout


def test_the_digest_is_of_names_and_shapes() -> None:
    one = Layout.of([("a", (2, 3)), ("b", (3,))])
    assert one.digest() == Layout.of([("a", (2, 3)), ("b", (3,))]).digest()
    assert one.digest() != Layout.of([("a", (3, 2)), ("b", (3,))]).digest()
    assert one.digest() != Layout.of([("c", (2, 3)), ("b", (3,))]).digest()


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '[["a"]]', '[["a",[1.5]]]', '[["a",[-1]]]', '[["a",[true]]]', '[["a",[1]],["a",[1]]]'],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(StateError):
        Layout.from_json(text)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(StateError, match="6 elements"):
        Layout.of([("a", (2, 3))]).views(np.zeros(5, np.float32))
