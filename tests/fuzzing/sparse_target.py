"""Target: what another member gives as its sparse update, and what somebody gives as the aggregate of a round."""

from __future__ import annotations

import msgpack
import numpy as np
from blake3 import blake3

from fuzzing.promise import check, parts_of, target
from p2pllm.averaging import Term
from p2pllm.averaging.form import SparseForm
from p2pllm.averaging.sparse import SparseCodec
from p2pllm.state import Layout

LAYOUT = Layout.of([("matrix", (70, 64)), ("cube", (3, 5, 7)), ("vector", (130,)), ("scalar", ())])
CODEC, FORM = SparseCodec(LAYOUT), SparseForm(LAYOUT)


def _encodings() -> list[bytes]:
    """Updates whose positions are spread, clustered and tied, and aggregates of them."""
    random = np.random.default_rng(1)
    normal = random.standard_normal(LAYOUT.size).astype(np.float32)
    vectors = [normal, normal * np.arange(LAYOUT.size, dtype=np.float32), np.zeros(LAYOUT.size, np.float32)]
    updates = [CODEC.encode(vector) for vector in vectors]
    return [*updates, FORM.pack(updates[:1]), FORM.pack(updates)]


@target(_encodings, max_bytes=3 * CODEC.max_bytes, memory=2 << 20)
def sparse(data: bytes) -> bool:
    """An update, and an aggregate whose record names whatever is in it.

    Memory: 2 MiB; a decoder takes 100 bytes for each of the elements that are kept, and the mean of all 4 for each of
    its 4,800 elements.
    """
    return _update(data) | _aggregate(data)


def _update(data: bytes) -> bool:
    try:
        update = CODEC.decode(data)
    except ValueError:
        return False
    check(len(update.positions) == len(update.values) == CODEC.count, "an update keeps another number of elements")
    check(bool((np.diff(update.positions) > 0).all()), "positions do not ascend")
    check(update.positions[0] >= 0 and update.positions[-1] < LAYOUT.size, "a position is outside of the vector")
    check(bool(np.isfinite(update.values).all()), "a value is not finite")
    return True


def _aggregate(data: bytes) -> bool:
    try:
        named = [Term(2, blake3(part).digest()) for part in parts_of(data) if isinstance(part, bytes)]
    except (ValueError, TypeError):  # it is no list
        named = []
    try:
        mean = FORM.vector(data, named or [Term(2, bytes(32))], 0)
    except ValueError:
        return False
    check(mean.shape == (LAYOUT.size,) and bool(np.isfinite(mean).all()), "an aggregate is no finite vector")
    check(len(msgpack.unpackb(data)) == len(named), "an aggregate has another number of updates than its record")
    return True
