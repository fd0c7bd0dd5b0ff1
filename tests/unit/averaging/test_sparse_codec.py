"""The sparse codec: what is kept, how it is coded, what comes back; and a second reader of the form on the wire."""

from __future__ import annotations

import math
import struct
import tracemalloc
from itertools import accumulate
from typing import Any

import constriction
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.averaging import indices
from p2pllm.averaging.sparse import MAX_MAGNITUDE, SparseCodec, SparseUpdate
from p2pllm.averaging.tiles import Grid
from p2pllm.state import Layout

stream = constriction.stream

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
    """Decode a valid encoding number by number, from nothing but the description in the codec's docstrings."""
    entries = [entry for entry in layout.entries if entry.size]
    codes = data[14 : 14 + len(entries)]
    tables = list(struct.iter_unpack("<2H", data[14 + len(entries) : 14 + 5 * len(entries)]))
    coder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4", offset=14 + 5 * len(entries)).astype(np.uint32))
    positions: list[int] = []
    values: list[float] = []
    for entry, code, table in zip(entries, codes, tables, strict=True):
        magnitudes = [struct.unpack("<f", struct.pack("<HH", 0, bits))[0] for bits in table]
        found = positions_of(coder, tiles_of(entry.shape, keep), 2.0 ** (code % 8 - 3), bool(code & 8))
        cols = entry.size // (entry.shape[0] if len(entry.shape) > 1 else 1)
        positions += sorted(entry.offset + row * cols + col for row, col in found)
        large = [coder.decode(stream.model.Bernoulli((code // 16 + 0.5) / 16, perfect=False)) for _ in found]
        signs = [coder.decode(stream.model.Bernoulli(0.5, perfect=False)) for _ in found]
        values += [magnitudes[which] * (-1 if minus else 1) for which, minus in zip(large, signs, strict=True)]
    return SparseUpdate(np.array(positions, np.int64), np.array(values, np.float32))


def positions_of(
    coder: Any, tiles: list[tuple[int, int, int, int, int]], shape: float, down: bool
) -> list[tuple[int, int]]:
    """Rows and columns of the kept elements of a tensor."""
    if down:
        tiles = [(left, top, width, height, kept) for top, left, height, width, kept in tiles]
    lines, length = max(tile[0] + tile[2] for tile in tiles), max(tile[1] + tile[3] for tile in tiles)
    share = sum(tile[4] for tile in tiles) / (lines * length)
    cells: dict[tuple[int, int], int] = {}
    before = 0.0
    for at in range(0, length, 64):
        expected = min(64, length - at) * share
        coded = [line for line in range(lines) if line % 64 != 63 and line != lines - 1]
        had = [sum(count for (other, _), count in cells.items() if other == line) for line in coded]
        counts = [coder.decode(model_of(so_far, shape, before, expected)) for so_far in had]
        rests = [coder.decode(stream.model.Uniform(49)) for count in counts if count == 16]
        for line, count in zip(coded, counts, strict=True):
            cells[line, at] = count + (rests.pop(0) if count == 16 else 0)
        before += expected
    for top, left, height, _, kept in tiles:
        others = sum(cells[line, left] for line in range(top, top + height - 1))
        cells[top + height - 1, left] = kept - others
    limits = [math.comb(min(64, length - at), cells[line, at]) for line, at in sorted(cells)]
    low = [max(math.frexp(limit - 1)[1] - 16, 0) for limit in limits]
    numbers = [
        coder.decode(stream.model.Uniform(top)) << bits if (top := (limit - 1 >> bits) + 1) > 1 else 0
        for limit, bits in zip(limits, low, strict=True)
    ]
    for place in (0, 16, 32):
        for which, bits in enumerate(low):
            if bits > place:
                numbers[which] |= coder.decode(stream.model.Uniform(1 << min(bits - place, 16))) << place
    found = []
    for (line, at), number in zip(sorted(cells), numbers, strict=True):
        for size in range(cells[line, at], 0, -1):
            last = max(place for place in range(64) if math.comb(place, size) <= number)
            number -= math.comb(last, size)
            found.append((at + last, line) if down else (line, at + last))
    return found


def model_of(had: int, shape: float, before: float, expected: float) -> Any:
    """Of the count of a cell whose line had so many elements."""
    spare = max(had.bit_length() - 5, 0)
    had = had >> spare << spare
    chances = [1.0]
    for step in range(64):
        chances.append(chances[-1] * ((shape + had + step) / (step + 1) * (expected / (shape + before + expected))))
    sums = list(accumulate(chances))
    known = [chance / sums[-1] for chance in chances[:16]] + [(sums[-1] - sums[15]) / sums[-1]]
    return stream.model.Categorical(np.array(known, np.float32), perfect=False)


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
    for code in range(indices.CODES):
        encoder = stream.queue.RangeEncoder()
        indices.encode(encoder, grid, code, positions)
        decoder = stream.queue.RangeDecoder(encoder.get_compressed())
        np.testing.assert_array_equal(indices.decode(decoder, grid, code), positions)
        assert decoder.maybe_exhausted()


def test_bits_on_random_data() -> None:
    """Within 1 % of log2 C(4096, 64) / 64 = 7.36 bits an index, and 2 bits a value."""
    codec = SparseCodec(Layout.of([("weight", (1024, 512))]))
    bound = (math.lgamma(4097) - math.lgamma(65) - math.lgamma(4033)) / math.log(2) / 64
    data = codec.encode(vector_of(codec.layout, 3))
    assert (8 * len(data) / codec.count - 2) / bound < 1.01
    assert 8 * len(data) / codec.layout.size <= 0.147


def test_clustered_positions_take_fewer_bits() -> None:
    """As in the embedding of a model, where the tokens that were seen moved."""
    codec = SparseCodec(Layout.of([("weight", (1024, 512))]))
    rows = np.random.default_rng(4).random(1024) < 0.05
    vector = (vector_of(codec.layout, 3).reshape(1024, 512) * (0.1 + rows[:, None])).astype(np.float32).reshape(-1)
    assert 8 * len(codec.encode(vector)) / codec.count < 6
    # the other way round as well: columns that move together
    turned = np.ascontiguousarray(vector.reshape(1024, 512).T).reshape(-1)
    other = SparseCodec(Layout.of([("weight", (512, 1024))]))
    assert len(other.encode(turned)) == pytest.approx(len(codec.encode(vector)), rel=0.01)


@pytest.mark.parametrize("shape", [(640, 640), (64, 4096), (4096, 64), (5000, 1), (1, 5000), (1000, 3)])
@pytest.mark.parametrize("keep", [1, 64, 4096])
def test_no_pattern_needs_more_than_is_said(shape: tuple[int, int], keep: int) -> None:
    """Whatever a line had is no hint, or a wrong one."""
    codec = SparseCodec(Layout.of([("weight", shape)]), keep)
    row, col = np.indices(shape)
    random = np.random.default_rng(7).random(shape)
    patterns = [
        row % 64 == col // 64 % 64,  # each tile has one full row, another one than the tile before
        (row + col) % 64 == 0,
        (row % 64 < 8) & (col % 64 < 8),
        (row // 64 + col // 64) % 2 == row % 2,
        (random < 0.5) & (col % 128 < 64) & (row % 2 == 0) | (col % 128 >= 64) & (row % 2 == 1),
    ]
    for pattern in patterns:
        vector = ((1 + random) * np.where(pattern, 1e3, 1)).astype(np.float32).reshape(-1)
        data = codec.encode(vector)
        assert len(data) <= codec.max_bytes
        assert len(codec.decode(data).positions) == codec.count


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
        12541,
        "3dd2b5b1d5ca793e",
        "76ba6f320b3b347c",
    )
    small = SparseCodec(Layout.of([("a", (2, 3)), ("b", (130,))]))
    recorded = bytes.fromhex("703273024000d440908d5127bb2f0750c84200000842bc425374e7a8")
    assert small.encode(np.arange(136, dtype=np.float32) - 100) == recorded
    update = small.decode(recorded)
    assert update.positions.tolist() == [0, 6, 133, 135]
    assert update.values.tolist() == [-100, -94, 34, 34]


def test_long_lines_take_no_memory_for_each_count_that_they_may_have() -> None:
    had = np.array([0, 40, 10_000_000])
    tracemalloc.start()
    chances = indices._chances(had, 1.0, 1e5, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chances.shape == (3, 17) and peak < 100_000
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-6)


def test_the_chosen_code_is_nearly_the_shortest() -> None:
    random = np.random.default_rng(8)
    for shape in ((320, 320), (257, 320), (864, 320)):
        grid = Grid(shape, 64)
        values = random.standard_normal(shape) * random.lognormal(0, 0.5, (shape[0], 1))
        values *= random.lognormal(0, 0.3, shape[1])
        positions = grid.select(values.astype(np.float32).reshape(-1))
        bits = []
        for code in range(indices.CODES):
            coder = stream.queue.RangeEncoder()
            indices.encode(coder, grid, code, positions)
            bits.append(coder.num_bits())
        assert bits[indices.choose(grid, positions)] <= 1.01 * min(bits)
        assert max(bits) > 1.1 * min(bits)


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
