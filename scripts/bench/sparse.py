"""What sparse compression costs and saves: ours beside the plain form of SparseLoCo, on one core.

The plain form takes torch.topk of each tile, packs an index of 12 bits and a value of 2 bits, and a table of four
magnitudes a tensor. Both get the same normal values, then values that cluster in rows and columns as those of real
updates do. Speeds are of CPU time, the best of some turns in which both take their turn.

    python scripts/bench/sparse.py [--size 50] [--members 8] [--repeats 5]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import constriction
import numpy as np
import torch
from _table import table

from p2pllm.averaging import indices
from p2pllm.averaging.sparse import MAX_MAGNITUDE, SparseCodec, _quantise, _Tensor
from p2pllm.averaging.sparse_mean import sparse_mean
from p2pllm.state import Layout

BOUND = (math.lgamma(4097) - math.lgamma(65) - math.lgamma(4033)) / math.log(2) / 64
"""Bits of an index, of 64 random ones among 4096, that no code can beat."""


class Ours:
    """The codec, step by step."""

    def __init__(self, layout: Layout) -> None:
        self.codec = SparseCodec(layout)
        self.tensors = list(zip(self.codec._grids, self.codec._entries, strict=True))

    def select(self, vector: np.ndarray) -> Any:
        return [grid.select(vector[entry.offset : entry.offset + entry.size]) for grid, entry in self.tensors]

    def quantise(self, vector: np.ndarray, positions: Any) -> list[_Tensor]:
        tensors = []
        for (_, entry), where in zip(self.tensors, positions, strict=True):
            values = vector[entry.offset + where]
            large, table = _quantise(np.minimum(np.abs(values), MAX_MAGNITUDE))
            negative = (values < 0) & (table[large.astype(np.intp)] > 0)
            tensors.append(_Tensor(where, negative, large, table))
        return tensors

    def pack(self, tensors: list[_Tensor]) -> bytes:
        return self.codec._pack(tensors)

    def decode(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        update = self.codec.decode(data)
        return update.positions, update.values

    def bits_an_index(self, tensors: list[_Tensor]) -> float:
        coder = constriction.stream.queue.RangeEncoder()
        for (grid, _), tensor in zip(self.tensors, tensors, strict=True):
            indices.encode(coder, grid, indices.choose(grid, tensor.positions), tensor.positions)
        return coder.num_bits() / self.codec.count


class Plain:
    """torch.topk, 12 bits an index, 2 bits a value; only for matrices of whole tiles."""

    def __init__(self, layout: Layout) -> None:
        self.entries = layout.entries

    def select(self, vector: np.ndarray) -> Any:
        found = []
        for entry in self.entries:
            rows, cols = entry.shape
            tensor = torch.from_numpy(vector[entry.offset : entry.offset + entry.size])
            tiles = tensor.view(rows // 64, 64, cols // 64, 64).transpose(1, 2).reshape(-1, 4096)
            at = tiles.abs().topk(64, sorted=False).indices
            found.append((at, tiles.gather(1, at)))
        return found

    def quantise(self, vector: np.ndarray, selected: Any) -> Any:
        parts = []
        for at, values in selected:
            sigma = values.std()
            code = ((values - values.mean()) / sigma / 3 + 2).clamp(0, 3).to(torch.uint8).flatten()
            sums = torch.bincount(code.int(), values.flatten(), minlength=4)
            means = sums / torch.bincount(code.int(), minlength=4).clamp(min=1)
            parts.append((at.to(torch.int16).flatten(), code, means.float()))
        return parts

    def pack(self, parts: Any) -> bytes:
        packed = []
        for at, code, means in parts:
            one, other = at[::2], at[1::2]
            three = torch.stack([one & 255, (one >> 8) | ((other & 15) << 4), other >> 4], 1).to(torch.uint8)
            four = code[::4] | code[1::4] << 2 | code[2::4] << 4 | code[3::4] << 6
            packed += [three.numpy().tobytes(), four.numpy().tobytes(), means.numpy().tobytes()]
        return b"".join(packed)

    def decode(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        positions, values, start = [], [], 0
        for entry in self.entries:
            count, tiles_across = entry.size // 64, entry.shape[1] // 64
            raw = np.frombuffer(data, np.uint8, count // 2 * 3, start).reshape(-1, 3).astype(np.int64)
            codes = np.frombuffer(data, np.uint8, count // 4, start + raw.size)
            means = np.frombuffer(data, np.float32, 4, start + raw.size + codes.size)
            start += raw.size + codes.size + means.nbytes
            at = np.stack([raw[:, 0] | (raw[:, 1] & 15) << 8, raw[:, 1] >> 4 | raw[:, 2] << 4], 1).reshape(-1, 64)
            band, across = np.divmod(np.arange(len(at))[:, None], tiles_across)
            flat = (band * 64 + (at >> 6)) * entry.shape[1] + across * 64 + (at & 63)
            positions.append(entry.offset + flat.reshape(-1))
            values.append(means[(codes[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1)])
        return np.concatenate(positions), np.concatenate(values)

    def bits_an_index(self, parts: Any) -> float:
        return 12.0


class Measured:
    """The best CPU seconds of each step, and what came out of the last turn."""

    def __init__(self, system: Ours | Plain) -> None:
        self.system = system
        self.seconds: dict[str, float] = {}
        self.size = self.index = self.error = 0.0

    def turn(self, vector: np.ndarray) -> None:
        selected = self._timed("select", self.system.select, vector)
        parts = self._timed("quantise", self.system.quantise, vector, selected)
        data = self._timed("pack", self.system.pack, parts)
        positions, values = self._timed("decode", self.system.decode, data)
        self.size, self.index = 8 * len(data), self.system.bits_an_index(parts)
        kept = vector[positions].astype(np.float64)
        self.error = float(np.square(kept - values).sum() / np.square(kept).sum())

    def _timed(self, step: str, work: Callable[..., Any], *values: Any) -> Any:
        start = time.process_time()
        result = work(*values)
        self.seconds[step] = min(time.process_time() - start, self.seconds.get(step, math.inf))
        return result


def vectors_of(layout: Layout) -> dict[str, np.ndarray]:
    """Normal values; and the same with some rows and columns larger than the others, as in a model that learns."""
    random = np.random.default_rng(0)
    normal = random.standard_normal(layout.size, dtype=np.float32)
    clustered = normal.copy()
    for view in layout.views(clustered).values():
        view *= random.lognormal(0, 0.7, (view.shape[0], 1)).astype(np.float32)
        view *= random.lognormal(0, 0.3, view.shape[1]).astype(np.float32)
    return {"normal": normal, "clustered": clustered}


def mean_seconds(codec: SparseCodec, vector: np.ndarray, members: int, divide_by: Any) -> float:
    """CPU seconds of the mean of so many updates."""
    update = codec.decode(codec.encode(vector))
    start = time.process_time()
    sparse_mean([update] * members, [1] * members, codec.layout.size, divide_by=divide_by)
    return time.process_time() - start


def row_of(name: str, measured: Measured, elements: int, base: Measured) -> list[str]:
    """Millions of parameters a second in each step, then bits."""
    speeds = [f"{elements / measured.seconds[step] / 1e6:.0f}" for step in ("select", "quantise", "pack")]
    encode, theirs = (sum(each.seconds.values()) - each.seconds["decode"] for each in (measured, base))
    return [
        name,
        *speeds,
        f"{elements / encode / 1e6:.0f}",
        f"{theirs / encode:.1f}",
        f"{elements / measured.seconds['decode'] / 1e6:.0f}",
        f"{measured.size / elements:.4f}",
        f"{measured.index:.2f}",
        f"{measured.index / BOUND:.3f}",
        f"{measured.error:.4f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=50, help="millions of parameters")
    parser.add_argument("--members", type=int, default=8, help="updates in a mean")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers = max(1, round(options.size * 1e6 / 2048**2))
    layout = Layout.of([(f"weight {layer}", (2048, 2048)) for layer in range(layers)])
    rows, means = [], []
    for kind, vector in vectors_of(layout).items():
        ours, plain = Measured(Ours(layout)), Measured(Plain(layout))
        for _ in range(options.repeats):
            ours.turn(vector)
            plain.turn(vector)
        rows += [row_of(f"ours, {kind}", ours, layout.size, plain), row_of(f"plain, {kind}", plain, layout.size, plain)]
        for divide_by in ("all", "senders"):
            seconds = mean_seconds(SparseCodec(layout), vector, options.members, divide_by)
            means.append([f"{kind}, by {divide_by}", f"{layout.size * options.members / seconds / 1e6:.0f}"])
    head = ["M parameters a second", "select", "quantise", "pack", "encode", "/ plain", "decode"]
    head += ["bits a parameter", "an index", "/ bound", "squared error"]
    print(
        f"{layout.size / 1e6:.1f} M parameters; an index takes {BOUND:.2f} bits at least where positions are random\n"
    )
    print(table(head, rows))
    print("\n" + table([f"mean of {options.members}", "M parameters a second"], means))


if __name__ == "__main__":
    main()
