"""What the sparse decoder refuses: everything that is not exactly the one encoding of an update of its layout."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.averaging.sparse import SparseCodec, SparseUpdate
from p2pllm.state import Layout

# 2 of 128 elements are kept: of the tile's rows of 32, or its columns of 4
LAYOUT = Layout.of([("weight", (4, 32))])
CODEC = SparseCodec(LAYOUT)
DIGEST = bytes.fromhex(LAYOUT.digest())[:8]


def forge(
    code: int = 14,
    table: tuple[float, float] = (1.0, 2.0),
    bits: str = "10" + "01" + "10001" + "1010111",
    prefix_bits: int = 5,
    head: bytes = b"p2s\x01" + struct.pack("<H", 64) + DIGEST,
    tail: bytes = b"",
) -> bytes:
    """By default -1 after a gap of 3, and 2 after one of 56. Bits: signs, classes, prefixes, suffixes."""
    bits += "0" * (-len(bits) % 8)
    packed = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    return head + struct.pack("<QB2f", prefix_bits, code, *table) + packed + tail


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
        (forge()[:-3], "has 30 bytes"),
        (forge() + b"xx", "has 35 bytes"),
        (forge(head=b"p2s\x02" + struct.pack("<H", 64) + DIGEST), "version"),
        (forge(head=b"p2s\x01" + struct.pack("<H", 65) + DIGEST), "another layout"),
        (forge(head=b"p2s\x01" + struct.pack("<H", 64) + b"otherrun"), "another layout"),
    ],
)
def test_header(data: bytes, sentence: str) -> None:
    refused(CODEC, data, sentence)


@pytest.mark.parametrize(
    "table, bits",
    [
        ((float("nan"), 2.0), "1001"),
        ((1.0, float("inf")), "1001"),
        ((-1.0, 2.0), "1001"),
        ((-0.0, 2.0), "0001"),
        ((1.0, 65537.0), "1001"),
        ((1.0, 1.0), "1001"),
        ((2.0, 1.0), "1001"),
        ((1.0, 2.0), "1000"),
        ((1.0, 2.0), "1011"),
        ((0.0, 2.0), "1001"),
        ((0.0, 0.0), "0100"),
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
def test_magnitudes(table: tuple[float, float], bits: str) -> None:
    refused(CODEC, forge(table=table, bits=bits + "10001" + "1010111"), "magnitude")


@pytest.mark.parametrize("prefix_bits", [0, 4, 6, 12, 13, 2**16, 2**63, 2**64 - 1])
def test_number_of_prefix_bits(prefix_bits: int) -> None:
    refused(CODEC, forge(prefix_bits=prefix_bits), "update")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"code": 24}, "unknown index code 24"),
        ({"code": 255}, "unknown index code 255"),
        # the second index would be the 129th of 128 elements
        ({"code": 5, "bits": "1001" + "00011" + "10" * 5}, "outside of its tile"),
        # a prefix for which no gap below 4096 is large enough
        ({"code": 12, "bits": "1001" + "1" + "0" * 13 + "1", "prefix_bits": 15}, "outside of its tile"),
        ({"bits": "1001" + "10011" + "1010111"}, "not 2"),
        ({"bits": "1001" + "00001" + "1010111"}, "not 2"),
        ({"tail": b"\0"}, "bits of indices"),
        ({"code": 11, "bits": "1001" + "11", "prefix_bits": 2}, "bits of indices"),
        # gaps 0 and 0 in a code that is longer than another, then counted down the columns
        ({"code": 1, "bits": "1001" + "11" + "00", "prefix_bits": 2}, "one form"),
        ({"code": 128, "bits": "1001" + "11", "prefix_bits": 2, "table": (1.0, 2.0)}, None),
        ({"code": 0, "bits": "1001" + "1" + "0" * 10 + "1", "prefix_bits": 12}, "one form"),
        # not zero where bits only fill up the byte
        ({"code": 0, "bits": "1001" + "11" + "01", "prefix_bits": 2}, "one form"),
    ],
)
def test_indices(change: dict, sentence: str | None) -> None:
    if sentence is None:  # elements 0 and 32: below each other
        assert CODEC.decode(forge(**change)).positions.tolist() == [0, 32]
    else:
        refused(CODEC, forge(**change), sentence)


def test_every_change_of_a_byte_is_refused_or_another_update() -> None:
    """Were two encodings taken for the same update, a claim about it could be signed in two ways."""
    layout = Layout.of([("weight", (70, 30)), ("gain", (70,)), ("scale", ())])
    codec, data = SparseCodec(layout), encoded(layout)
    original, taken = codec.decode(data), 0
    for at in range(len(data)):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(data)
            damaged[at] ^= change
            update = decoded(codec, damaged)
            if update is not None:
                taken += 1
                assert not (
                    np.array_equal(update.positions, original.positions)
                    and np.array_equal(update.values, original.values)
                )
    assert 0 < taken < 9 * len(data)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_noise_is_refused_or_an_update(data: st.DataObject) -> None:
    layout = Layout.of([("weight", (66, 20)), ("gain", (70,))])
    codec, start = SparseCodec(layout), encoded(layout)[:14]
    length = codec.max_bytes - 14
    prefix_bits = data.draw(st.integers(0, 2 * codec.count + 8) | st.integers(0, 2**64 - 1))
    rest = data.draw(st.binary(max_size=length - 8))
    decoded(codec, start + struct.pack("<Q", prefix_bits) + rest)
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
    hostile = [
        good,
        good[:14] + struct.pack("<Q", 2**40) + good[22:],
        good[:31] + bytes(codec.max_bytes - 31),
        good[:31] + b"\xff" * (codec.max_bytes - 31),
        good * 50,
    ]
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
