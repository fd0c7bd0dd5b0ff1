"""What the sparse decoder refuses: everything that is no encoding of an update of its layout."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Sequence

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.averaging.sparse import SparseCodec, SparseUpdate
from p2pllm.state import Layout

stream = constriction.stream

# 2 of 128 elements are kept: of the only tile, which has 4 rows of 32
LAYOUT = Layout.of([("weight", (4, 32))])
CODEC = SparseCodec(LAYOUT)
DIGEST = bytes.fromhex(LAYOUT.digest())[:8]


def forge(
    counts: Sequence[int] = (1, 1, 0),
    numbers: Sequence[tuple[int, int]] = ((3, 32), (28, 32)),
    large: Sequence[int] = (0, 1),
    negative: Sequence[int] = (1, 0),
    table: tuple[float, float] = (1.0, 2.0),
    head: bytes = b"p2s\x02" + struct.pack("<H", 64) + DIGEST,
    tail: bytes = b"",
) -> bytes:
    """By default -1 at 3, and 2 at 60. counts: of each row but the last. numbers: and what each is below."""
    coder = stream.queue.RangeEncoder()
    for count in counts:
        coder.encode(min(count, 16), stream.model.Categorical(chances(), perfect=False))
        if count >= 16:
            coder.encode(count - 16, stream.model.Uniform(49))
    for number, limit in numbers:
        coder.encode(number, stream.model.Uniform(limit))
    for bits in (large, negative):
        for bit in bits:
            coder.encode(bit, stream.model.Bernoulli(0.5 if bits is negative else 8.5 / 16, perfect=False))
    magnitudes = b"".join(struct.pack("<f", value)[2:] for value in table)
    return head + bytes([8 * 16 + 3]) + magnitudes + coder.get_compressed().astype("<u4").tobytes() + tail


def chances() -> np.ndarray:
    """Of the count of a row of 32 that half an element is expected of, where rows differ by a shape of 1."""
    some = np.cumprod([1.0, *[(1.0 + step) / (step + 1) * (0.5 / 1.5) for step in range(64)]])
    sums = np.cumsum(some)
    return np.array([*some[:16] / sums[-1], (sums[-1] - sums[15]) / sums[-1]], np.float32)


def encoded(layout: Layout, seed: int = 0) -> bytes:
    vector = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    return SparseCodec(layout).encode(vector)


def test_what_is_forged_well_is_taken() -> None:
    update = CODEC.decode(forge())
    assert (update.positions.tolist(), update.values.tolist()) == ([3, 60], [-1.0, 2.0])


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "has 0 bytes"),
        (forge()[:-3], "in steps of 4"),
        (forge()[:18], "has 18 bytes"),
        (forge() * 9, "has 207 bytes"),
        (forge() + b"x" * 8, "longer than what it says"),
        (forge(head=b"p2s\x01" + struct.pack("<H", 64) + DIGEST), "version"),
        (forge(head=b"p2s\x02" + struct.pack("<H", 65) + DIGEST), "another layout"),
        (forge(head=b"p2s\x02" + struct.pack("<H", 64) + b"otherrun"), "another layout"),
    ],
)
def test_header(data: bytes, sentence: str) -> None:
    refused(CODEC, data, sentence)


@pytest.mark.parametrize(
    "table, negative, large",
    [
        ((float("nan"), 2.0), (1, 0), (0, 1)),
        ((1.0, float("inf")), (1, 0), (0, 1)),
        ((-1.0, 2.0), (1, 0), (0, 1)),
        ((-0.0, 2.0), (0, 0), (0, 1)),
        ((1.0, 66048.0), (1, 0), (0, 1)),
        ((1.0, 1.0), (1, 0), (0, 1)),
        ((2.0, 1.0), (1, 0), (0, 1)),
        ((1.0, 2.0), (1, 0), (0, 0)),
        ((1.0, 2.0), (1, 0), (1, 1)),
        ((0.0, 2.0), (1, 0), (0, 1)),
        ((0.0, 0.0), (0, 1), (0, 0)),
    ],
    ids=[
        "nan",
        "infinite",
        "negative",
        "-0",
        "absurd",
        "equal",
        "reversed",
        "unused",
        "no small",
        "-0 small",
        "-0 all",
    ],
)
def test_magnitudes(table: tuple[float, float], negative: tuple[int, int], large: tuple[int, int]) -> None:
    refused(CODEC, forge(table=table, negative=negative, large=large), "magnitudes|zero with a sign")


@pytest.mark.parametrize(
    "change, sentence",
    [
        # more than the tile has, so the last row would have fewer than none
        ({"counts": (1, 1, 1), "numbers": [(3, 32)] * 3, "large": (0, 0, 1), "negative": (0, 0, 0)}, "another number"),
        ({"counts": (33, 0, 0), "numbers": ()}, "another number"),
        ({"counts": (64, 64, 64), "numbers": ()}, "another number"),
        # all in the last row, whose count is not said
        ({"counts": (0, 0, 0), "numbers": [(4, 496)]}, None),
    ],
)
def test_positions(change: dict, sentence: str | None) -> None:
    if sentence is None:  # number 4 of two: 1 and 3
        assert CODEC.decode(forge(**change)).positions.tolist() == [97, 99]
    else:
        refused(CODEC, forge(**change), sentence)


def test_bits_that_no_coder_writes() -> None:
    refused(CODEC, forge()[:19] + b"\xff" * 12, "bits that say nothing")


def test_a_number_above_all_choices() -> None:
    """Of 20 elements of 64 there are more than 2 ** 54 choices, and the lowest bits are coded without looking."""
    codec = SparseCodec(Layout.of([("weight", (1, 64))]), keep=20 * 64)
    limit = math.comb(64, 20)
    low = (limit - 1).bit_length() - 16
    for number, right in ((limit - 1, True), (limit, False)):
        coder = stream.queue.RangeEncoder()
        coder.encode(number >> low, stream.model.Uniform((limit - 1 >> low) + 1))
        for place in range(0, low, 16):
            size = 1 << min(low - place, 16)
            coder.encode(number >> place & size - 1, stream.model.Uniform(size))
        for bit, share in ((0, 0.5 / 16), (0, 0.5)):
            coder.encode(np.full(20, bit, np.int32), stream.model.Bernoulli(share, perfect=False))
        head = b"p2s\x02" + struct.pack("<H", 1280) + bytes.fromhex(codec.layout.digest())[:8]
        data = head + bytes(5) + coder.get_compressed().astype("<u4").tobytes()
        if right:
            assert codec.decode(data).positions.tolist() == list(range(44, 64))
        else:
            refused(codec, data, "outside of its tile")


def test_every_change_of_a_byte_is_refused_or_an_update() -> None:
    layout = Layout.of([("weight", (70, 30)), ("gain", (70,)), ("scale", ())])
    codec, data = SparseCodec(layout), encoded(layout)
    taken = 0
    for at in range(len(data)):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(data)
            damaged[at] ^= change
            taken += decoded(codec, damaged) is not None
    assert 0 < taken < 9 * len(data)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_noise_is_refused_or_an_update(data: st.DataObject) -> None:
    layout = Layout.of([("weight", (66, 20)), ("gain", (70,))])
    codec, start = SparseCodec(layout), encoded(layout)[:14]
    words = data.draw(st.integers(0, (codec.max_bytes - 24) // 4))
    decoded(codec, start + data.draw(st.binary(min_size=10 + 4 * words, max_size=10 + 4 * words)))
    decoded(codec, data.draw(st.binary(max_size=codec.max_bytes)))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damage_at_several_places(data: st.DataObject) -> None:
    layout = Layout.of([("weight", (66, 70)), ("gain", (70,))])
    codec, whole = SparseCodec(layout), bytearray(encoded(layout))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(14, len(whole) - 1))] = data.draw(st.integers(0, 255))
    decoded(codec, whole)
    decoded(codec, whole[: data.draw(st.integers(0, len(whole)))])


@pytest.mark.parametrize("other", [[("weight", (32, 4))], [("bias", (4, 32))], [("weight", (4, 32)), ("bias", ())]])
def test_update_of_another_layout(other: list) -> None:
    refused(CODEC, encoded(Layout.of(other)), "update")


def test_memory_is_bounded_before_anything_is_checked_in_detail() -> None:
    codec = SparseCodec(Layout.of([("weight", (1024, 1024))]))
    good = encoded(codec.layout)
    most = (codec.max_bytes - 19) // 4 * 4
    hostile = [good, good[:19] + bytes(most), good[:19] + b"\xff" * most, good[:19] + b"\x55" * most, good * 50]
    for data in hostile:
        tracemalloc.start()
        decoded(codec, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 120 * codec.count


def refused(codec: SparseCodec, data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        codec.decode(data)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and ("update" in text or "bytes" in text)


def decoded(codec: SparseCodec, data: bytes | bytearray) -> SparseUpdate | None:
    """The update, which must be one of the layout; None if `data` is refused."""
    try:
        update = codec.decode(data)
    except ValueError as error:
        assert "update" in str(error)
        return None
    assert len(update.positions) == len(update.values) == codec.count
    assert (np.diff(update.positions) > 0).all()
    assert not codec.count or 0 <= update.positions[0] <= update.positions[-1] < codec.layout.size
    assert (np.abs(update.values) <= 65536).all()
    return update
