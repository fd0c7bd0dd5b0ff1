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


BOMBS: dict[str, bytes] = {
    "lists in lists": b"\x91",
    "long lists in lists": b"\xdc\xff\xff",
    "longer lists in lists": b"\xdd\x00\x01\x00\x00",
    "endless lists in lists": b"\xdd\xff\xff\xff\xff",
    "maps in maps": b"\x81\xa1k",
    "long maps in maps": b"\xde\xff\xff\xa1k",
    "endless maps in maps": b"\xdf\xff\xff\xff\xff\xa1k",
    "maps with lists for keys": b"\x81\x90",
    "endless text": b"\xdb\xff\xff\xff\xff",
    "endless bytes": b"\xc6\xff\xff\xff\xff",
    "endless extensions": b"\xc9\xff\xff\xff\xff\x01",
    "times": b"\xdc\xff\xff" + b"\xd6\xff\xff\xff\xff\xff" * 8,
    "times that cannot be": b"\xd7\xff" + b"\xff" * 8,
    "long times": b"\xc7\x0c\xff" + b"\xff" * 12,
    "no msgpack": b"\xc1",
    "JSON lists in lists": b"[",
    "JSON maps in maps": b'{"model":',
    "JSON digits": b"9",
    "JSON escapes": b'{"\\ud800":1e999,',
    "text of an invite": b"p2pllm:" + b"a" * 4000,
    "frames that never end": b"\xf5p2L\x01\x00\x00\x5f\xff",
    "frames of nothing": b"\xf5p2L\x01\x00\x00\x00\x00",
}


@each_target
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(target: Target, bomb: str) -> None:
    """Alone, and where something else should follow."""
    load = BOMBS[bomb] * (target.max_bytes // len(BOMBS[bomb]) + 1)
    seed = target.seeds()[0]
    for at in (0, 1, len(seed) // 2):
        target.keep((seed[:at] + load)[: target.max_bytes])


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
