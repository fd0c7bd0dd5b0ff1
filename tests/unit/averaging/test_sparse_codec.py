"""The sparse codec: what is kept, how it is coded, what comes back; and a second reader of the form on the wire."""

from __future__ import annotations

import math
import struct
from itertools import accumulate

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.averaging.sparse import MAX_MAGNITUDE, SparseCodec, SparseUpdate
from p2pllm.averaging.tiles import Grid
from p2pllm.state import Layout

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(0, 150), st.integers(0, 150)),
    st.tuples(st.integers(1, 70), st.integers(0, 5), st.integers(1, 30)),
)
layouts = st.lists(shapes, max_size=4).map(lambda found: Layout.of([(str(i), shape) for i, shape in enumerate(found)]))
LARGE = Layout.of([("embedding", (300, 512)), ("gain", (512,)), ("weight", (1024, 512))])


def vector_of(layout: Layout, seed: int, kind: str = "normal") -> np.ndarray:
    random = np.random.default_rng(seed)
    values = random.standard_normal(layout.size)
    if kind == "ties":
        values = np.round(values)
    elif kind == "zeros":
        values = values * (random.random(layout.size) < 0.005)
    elif kind == "rows":
        values = values * (np.arange(layout.size) // 100 % 7 == 0)
    elif kind == "huge":
        values = values * 1e30
    return values.astype(np.float32)


kinds = st.sampled_from(["normal", "ties", "zeros", "rows", "huge"])


def kept_by_definition(tensor: np.ndarray, keep: int) -> list[int]:
    """The positions to keep, tile by tile, by a full sort of each."""
    matrix = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    places = np.arange(matrix.size).reshape(matrix.shape)
    found: list[int] = []
    for top in range(0, matrix.shape[0], 64):
        for left in range(0, matrix.shape[1], 64):
            tile = slice(top, top + 64), slice(left, left + 64)
            order = np.argsort(-np.abs(matrix[tile].reshape(-1)), kind="stable")
            found += places[tile].reshape(-1)[order[: math.ceil(order.size * keep / 4096)]].tolist()
    return sorted(found)


def read_plainly(layout: Layout, keep: int, data: bytes) -> SparseUpdate:
    """Decode a valid encoding bit by bit, from nothing but the description in the codec's docstrings."""
    entries = [entry for entry in layout.entries if entry.size]
    at, prefix_bits = 22, struct.unpack_from("<Q", data, 14)[0]
    codes = data[at : at + len(entries)]
    tables = list(struct.iter_unpack("<2f", data[at + len(entries) : at + 9 * len(entries)]))
    bits = [byte >> place & 1 for byte in data[at + 9 * len(entries) :] for place in range(8)]
    tiles = [tiles_of(entry.shape, keep) for entry in entries]
    counts = [sum(kept for *_, kept in each) for each in tiles]
    count = sum(counts)
    signs, classes, unary = bits[:count], bits[count : 2 * count], bits[2 * count : 2 * count + prefix_bits]
    prefixes = [len(run) for run in "".join(map(str, unary)).split("1")[:-1]]
    owners = [code for code, each in zip(codes, counts, strict=True) for _ in range(each)]
    numbers = [code & 127 for code in owners]
    widths = [n % 12 + (p if n >= 12 else 0) for n, p in zip(numbers, prefixes, strict=True)]
    suffixes, rest = [0] * count, iter(bits[2 * count + prefix_bits :])
    for place in range(max(widths, default=0)):
        for index, width in enumerate(widths):
            suffixes[index] += (next(rest) << place) if width > place else 0
    assert not any(rest)
    positions, values, gaps = [], [], []
    for number, prefix, suffix in zip(numbers, prefixes, suffixes, strict=True):
        gaps.append(((((1 << prefix) - 1) if number >= 12 else prefix) << number % 12) + suffix)
    todo = iter(gaps)
    for entry, code, each in zip(entries, codes, tiles, strict=True):
        cols = entry.size // (entry.shape[0] if len(entry.shape) > 1 else 1)
        found = []
        for top, left, height, width, kept in each:
            for inside in accumulate((next(todo) for _ in range(kept)), lambda last, gap: last + 1 + gap, initial=-1):
                row, col = divmod(inside, width) if code < 128 else divmod(inside, height)[::-1]
                found.append((top + row) * cols + left + col if inside >= 0 else -1)
        positions += [entry.offset + place for place in sorted(found) if place >= 0]
    for table, each in zip(tables, counts, strict=True):
        for _ in range(each):
            values.append(table[classes[len(values)]] * (-1 if signs[len(values)] else 1))
    return SparseUpdate(np.array(positions, np.int64), np.array(values, np.float32))


def tiles_of(shape: tuple[int, ...], keep: int) -> list[tuple[int, int, int, int, int]]:
    rows = shape[0] if len(shape) > 1 else 1
    cols = math.prod(shape) // rows
    corners = [(top, left) for top in range(0, rows, 64) for left in range(0, cols, 64)]
    sides = [(top, left, min(64, rows - top), min(64, cols - left)) for top, left in corners]
    return [(*side, math.ceil(side[2] * side[3] * keep / 4096)) for side in sides]


@settings(deadline=None, max_examples=60)
@given(layout=layouts, keep=st.sampled_from([1, 17, 64, 300, 4096]), seed=st.integers(0, 99), kind=kinds)
def test_keeps_the_largest_and_comes_back(layout: Layout, keep: int, seed: int, kind: str) -> None:
    codec, vector = SparseCodec(layout, keep), vector_of(layout, seed, kind)
    before = vector.copy()
    data = codec.encode(vector)
    update = codec.decode(data)
    np.testing.assert_array_equal(vector, before)
    assert len(data) <= codec.max_bytes
    expected = [
        entry.offset + place
        for entry in layout.entries
        if entry.size
        for place in kept_by_definition(vector[entry.offset : entry.offset + entry.size].reshape(entry.shape), keep)
    ]
    assert update.positions.tolist() == expected
    assert update.positions.dtype == np.int64 and update.values.dtype == np.float32
    assert len(expected) == codec.count
    assert (np.abs(update.values) <= MAX_MAGNITUDE).all()
    sent = np.clip(vector[update.positions], -MAX_MAGNITUDE, MAX_MAGNITUDE)
    assert (update.values * sent >= 0).all()
    # what is left is never more than what was there, so error feedback cannot grow
    assert np.square(sent.astype(float) - update.values).sum() <= np.square(sent.astype(float)).sum() * (1 + 1e-6)


@settings(deadline=None, max_examples=25)
@given(layout=layouts, keep=st.sampled_from([17, 64, 1000]), seed=st.integers(0, 99), kind=kinds)
def test_a_second_reader_reads_the_same(layout: Layout, keep: int, seed: int, kind: str) -> None:
    codec = SparseCodec(layout, keep)
    data = codec.encode(vector_of(layout, seed, kind))
    update, plain = codec.decode(memoryview(bytearray(data))), read_plainly(layout, keep, data)
    np.testing.assert_array_equal(update.positions, plain.positions)
    np.testing.assert_array_equal(update.values, plain.values)
    assert not np.signbit(update.values[update.values == 0]).any()


@settings(deadline=None, max_examples=40)
@given(layout=layouts, seed=st.integers(0, 99), kind=kinds)
def test_what_is_decoded_encodes_to_itself(layout: Layout, seed: int, kind: str) -> None:
    codec = SparseCodec(layout)
    update = codec.decode(codec.encode(vector_of(layout, seed, kind)))
    vector = np.zeros(layout.size, np.float32)
    vector[update.positions] = update.values
    again = codec.decode(codec.encode(vector))
    kept = np.zeros(layout.size, np.float32)
    kept[again.positions] = again.values
    np.testing.assert_array_equal(kept, vector)


def test_a_mean_that_rounds_to_zero_has_no_sign() -> None:
    codec = SparseCodec(Layout.of([("weight", (64, 64))]))
    vector = np.zeros(4096, np.float32)
    vector[[0, 1, 2]] = 1, -1e-45, -1
    assert codec.decode(codec.encode(vector)).values.tolist()[:3] == [1, 0, -1]


@pytest.mark.parametrize("rows, cols", [(64, 9000), (200, 4200), (1, 300_000), (9000, 3)])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_tensors_larger_than_a_block(rows: int, cols: int, kind: str) -> None:
    grid = Grid((rows, cols), 64)
    tensor = vector_of(Layout.of([("w", (rows, cols))]), 1, kind)
    positions = grid.select(tensor)
    assert positions.tolist() == kept_by_definition(tensor.reshape(rows, cols), 64)
    for down, gaps in enumerate(grid.gaps(positions)):
        np.testing.assert_array_equal(grid.positions(gaps, bool(down)), positions)


def test_bits_on_random_data() -> None:
    """Within 5 % of log2 C(4096, 64) / 64 = 7.36 bits an index, and 2 bits a value."""
    codec = SparseCodec(Layout.of([("weight", (1024, 512))]))
    bound = (math.lgamma(4097) - math.lgamma(65) - math.lgamma(4033)) / math.log(2) / 64
    data = codec.encode(vector_of(codec.layout, 3))
    assert (8 * len(data) / codec.count - 2) / bound < 1.05
    assert 8 * len(data) / codec.layout.size <= 0.155
    assert 8 * codec.max_bytes / codec.layout.size <= 0.16


def test_clustered_positions_take_fewer_bits() -> None:
    """As in the embedding of a model, where the tokens that were seen moved."""
    codec = SparseCodec(Layout.of([("weight", (1024, 512))]))
    rows = np.random.default_rng(4).random(1024) < 0.05
    vector = (vector_of(codec.layout, 3).reshape(1024, 512) * (0.1 + rows[:, None])).astype(np.float32).reshape(-1)
    assert 8 * len(codec.encode(vector)) / codec.count < 7.5
    # the other way round as well: columns that move together
    turned = np.ascontiguousarray(vector.reshape(1024, 512).T).reshape(-1)
    other = SparseCodec(Layout.of([("weight", (512, 1024))]))
    assert len(other.encode(turned)) == len(codec.encode(vector))


def test_magnitudes_beat_four_bins_of_equal_width() -> None:
    """What the paper does: centre, clip at six standard deviations, four equal bins, their means."""
    codec = SparseCodec(Layout.of([("weight", (512, 512))]))
    for vector in (vector_of(codec.layout, 5), np.random.default_rng(5).laplace(size=512 * 512).astype(np.float32)):
        update = codec.decode(codec.encode(vector))
        kept = vector[update.positions].astype(float)
        bins = np.clip((kept - kept.mean()) / kept.std() / 3 + 2, 0, 3.999).astype(int)
        means = np.array([kept[bins == number].mean() if (bins == number).any() else 0.0 for number in range(4)])
        ours, theirs = (np.square(kept - coded).sum() for coded in (update.values, means[bins]))
        assert ours < 0.4 * theirs


def test_format_is_as_recorded() -> None:
    """Change the magic if you must change this: other versions would misread the bytes."""
    codec = SparseCodec(LARGE)
    whole = np.arange(1, LARGE.size + 1, dtype=np.int64) * 2654435761 % 16777213
    vector = ((whole - 8388606) >> 12).astype(np.float32) * np.float32(2.0**-20)
    data = codec.encode(vector)
    update = codec.decode(data)
    decoded = blake3(update.positions.astype("<i8").tobytes() + update.values.astype("<f4").tobytes()).hexdigest()
    assert (len(data), blake3(data).hexdigest()[:16], decoded[:16]) == (
        12613,
        "714f6eb09e4498ec",
        "4ff4d8f50c07596e",
    )
    small = SparseCodec(Layout.of([("a", (2, 3)), ("b", (130,))]))
    data = small.encode(np.arange(136, dtype=np.float32) - 100)
    assert data.hex() == "703273014000d440908d5127bb2f0900000000000000000d0000c84200000000000008420000bc4223830d00"


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 700, -1])
def test_refuses_to_encode_what_is_not_finite(wrong: float, at: int) -> None:
    codec = SparseCodec(Layout.of([("weight", (70, 71)), ("gain", (71,))]))
    vector = vector_of(codec.layout, 0)
    vector[at] = wrong
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(vector)


def test_refuses_to_encode_another_shape_or_type() -> None:
    codec = SparseCodec(LARGE)
    for vector in (np.zeros(3, np.float32), np.zeros(LARGE.size, np.float64), np.zeros((1, LARGE.size), np.float32)):
        with pytest.raises(ValueError, match="must be float32 of shape"):
            codec.encode(vector)


@pytest.mark.parametrize("keep", [0, -1, 4097])
def test_refuses_an_impossible_density(keep: int) -> None:
    with pytest.raises(ValueError, match="1 to 4096"):
        SparseCodec(LARGE, keep)
