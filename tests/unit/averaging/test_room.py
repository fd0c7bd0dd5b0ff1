"""Room: memory is used again once nobody holds it, and never before."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from p2pllm.averaging.exchange import view_of
from p2pllm.averaging.room import Room


def test_the_memory_of_a_vector_that_is_gone_is_used_again() -> None:
    room = Room()
    vector = room.take(1000)
    assert vector.shape == (1000,)
    assert vector.dtype == np.float32
    vector[:] = 1
    address = vector.ctypes.data
    del vector
    again = room.take(1000)
    assert again.ctypes.data == address
    again[:] = 2
    assert (again == 2).all()
    del again
    smaller = room.take(900)
    assert smaller.shape == (900,)
    assert smaller.ctypes.data == address


@pytest.mark.parametrize(
    "view",
    [
        lambda vector: vector[10:20],
        lambda vector: vector[10:][:10].reshape(2, 5).T,
        lambda vector: vector.view(np.int32),
        lambda vector: view_of(vector)[40:80],
        lambda vector: np.frombuffer(view_of(vector).toreadonly(), np.float32)[5:],
    ],
)
def test_a_vector_of_which_any_view_is_held_is_left_alone(view) -> None:
    room = Room()
    vector = room.take(1000)
    vector[:] = 1
    held = view(vector)
    before = bytes(held)
    del vector
    gc.collect()
    other = room.take(1000)
    other[:] = 2
    assert not np.shares_memory(other, np.asarray(held))
    assert bytes(held) == before


def test_several_may_be_held_at_once_and_sizes_may_change() -> None:
    room = Room()
    held = [room.take(size) for size in (1000, 1000, 5, 0, 1000)]
    for index, vector in enumerate(held):
        vector[:] = index
    assert [set(vector.tolist()) for vector in held] == [{0.0}, {1.0}, {2.0}, set(), {4.0}]
    held.clear()
    assert room.take(7).shape == (7,)
