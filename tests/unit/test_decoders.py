"""Whatever strangers send, a decoder takes it, or refuses it with its own error, soon and in little memory.

The targets and what they promise are those of `scripts/fuzz`, see tests/fuzzing; here each gets some noise, what the
encoders make with a few things changed, and bytes that are made to cost much.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing.bombs import BOMBS, loaded
from fuzzing.mutate import changed
from fuzzing.promise import BrokenPromiseError, Target
from fuzzing.targets import TARGETS

EXAMPLES = 30
"""For each target and kind of input: the slowest of them runs a swarm of two for each."""

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


@pytest.fixture(scope="module", autouse=True)
def begun() -> None:
    """What is imported once counts for nobody."""
    for target in TARGETS.values():
        target.begin()


@each_target
def test_what_the_encoders_make_is_taken(target: Target) -> None:
    """Else all that follows would show nothing."""
    for seed in target.seeds():
        assert len(seed) <= target.max_bytes
        assert target.keep(seed)


@each_target
@settings(max_examples=EXAMPLES)
@given(noise=st.binary(max_size=400))
def test_noise(target: Target, noise: bytes) -> None:
    target.keep(noise)


@each_target
@settings(max_examples=EXAMPLES)
@given(
    draw=st.integers(0, 1 << 32).map(random.Random),
    values=st.integers(0, 3),
    flips=st.integers(0, 2),
    cut=st.booleans(),
)
def test_what_the_encoders_make_changed(
    target: Target, draw: random.Random, values: int, flips: int, cut: bool
) -> None:
    data = draw.choice(target.seeds())
    for _ in range(values):
        data = changed(data, draw, is_json=target.is_json) or data
    flipped = bytearray(data[: target.max_bytes])
    for _ in range(min(flips, len(flipped))):
        flipped[draw.randrange(len(flipped))] = draw.randrange(256)
    target.keep(bytes(flipped[: draw.randrange(len(flipped) + 1)] if cut else flipped))


@each_target
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(target: Target, bomb: str) -> None:
    for data in loaded(BOMBS[bomb], target):
        target.keep(data)


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda data: sum(range(10**6)) < 0, "0 bytes took 0.* s"),
        (lambda data: bool(bytearray(3000)), "0 bytes took 3.* bytes of memory, not 2000"),
        (lambda data: bool(data[9]), "index out of range"),
    ],
)
def test_a_promise_that_is_broken_is_seen(read: Callable[[bytes], bool], words: str) -> None:
    target = dataclasses.replace(TARGETS["vote"], read=read, memory=2000)
    with pytest.raises((BrokenPromiseError, IndexError), match=words):
        target.keep(b"", seconds=1e-3)


def test_one_value_is_changed_at_whatever_depth() -> None:
    draw, seed = random.Random(1), TARGETS["chunks"].seeds()[0]
    others = {changed(seed, draw) for _ in range(100)}
    assert len(others - {None, seed}) > 50
    assert changed(b"\xc1", draw) is changed(b"\x90", draw) is changed(b"nothing", draw, is_json=True) is None
