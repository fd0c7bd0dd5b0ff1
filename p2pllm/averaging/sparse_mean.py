"""The weighted mean of sparse updates, in an arithmetic that is the same on every machine.

An update whose norm is above the median of all is first scaled down to it, so that one member cannot outweigh the
others by sending large numbers. What does not live here: where updates come from (`sparse`), the dense mean (`mean`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np

from p2pllm.averaging.group import MAX_WEIGHT
from p2pllm.averaging.sparse import SparseUpdate
from p2pllm.averaging.tiles import Floats
from p2pllm.state.outer import sum_of_squares


def sparse_mean(
    updates: Sequence[SparseUpdate],
    weights: Sequence[int],
    size: int,
    *,
    divide_by: Literal["all", "senders"],
) -> Floats:
    """The mean of `updates` in the given order, weighted by `weights` (samples), as float32 (size,).

    divide_by: "all" divides each element by the weight of all members, so what few of them send counts little;
    "senders" by the weight of those that sent this element. Elements that nobody sent are 0.

    Whoever has the same updates in the same order gets the same bits, because the weight of an update, its norm and
    the median are float64 from exact integers, + * / and sqrt in a fixed order (see `sum_of_squares`), rounded once to
    float32; and each element sees one float32 multiplication and one addition an update, in the given order, each
    rounded on its own, and with "senders" one division. No update holds an element twice, so no sum has an order that
    NumPy could choose.

    Raises ValueError without updates, for a weight that is not from 1 to 2**53, and for a position that is not below
    `size`.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(f"There are {len(updates)} sparse updates to average and {len(weights)} weights.")
    if not all(1 <= weight <= MAX_WEIGHT for weight in weights):
        raise ValueError(f"Every weight is at least 1 and at most {MAX_WEIGHT:g}.")
    for update in updates:
        if len(update.positions) and not 0 <= update.positions[0] <= update.positions[-1] < size:
            raise ValueError(f"A sparse update has a position that is not below {size}.")
    total = sum(weights)
    mean = np.zeros(size, np.float32)
    share = np.zeros(size if divide_by == "senders" else 0, np.float32)
    for update, weight, scale in zip(updates, weights, _scales(updates), strict=True):
        # += reads, adds and writes once for each position, since none comes twice
        mean[update.positions] += update.values * np.float32(weight / total * scale)
        if divide_by == "senders":
            share[update.positions] += np.float32(weight / total)
    if divide_by == "senders":
        np.divide(mean, share, out=mean, where=share > 0)
    return mean


def _scales(updates: Sequence[SparseUpdate]) -> list[float]:
    """What brings each update's L2 norm down to the median of all, at most 1."""
    norms = [math.sqrt(sum_of_squares(update.values)) for update in updates]
    median = statistics.median(norms)
    return [1.0 if norm <= median else median / norm for norm in norms]
