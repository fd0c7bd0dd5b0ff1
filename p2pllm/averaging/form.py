"""Forms: what an aggregate is, as bytes that the log names and every peer can read again.

In `dense` exchanges it is the weighted mean itself; in `sparse` ones it is the members' updates, from which each peer
makes the mean for itself. What does not live here: how aggregates come about between peers (`dense`, `gather`), and
keeping them (`rounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgpack
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from p2pllm.averaging.sparse import SparseCodec, SparseUpdate
from p2pllm.averaging.sparse_mean import sparse_mean
from p2pllm.state import FLOAT, Layout, span_of
from p2pllm.state.chunks import BytesLike

Vector = NDArray[np.float32]

_FRAMING_BYTES = 8
"""msgpack's part of one update in a list of them, at most."""


@dataclass(frozen=True)
class Term:
    """What the record of a round says of one member's update: its weight in samples, and its digest, 32 bytes."""

    samples: int
    digest: bytes


class Form(Protocol):
    """How to read the aggregates of a run."""

    def max_bytes(self, members: int) -> int:
        """The largest aggregate of so many updates."""
        ...

    def vector(self, aggregate: BytesLike, terms: Sequence[Term], round: int) -> Vector:  # noqa: A002 - the word
        """The mean update, float32, the same bits on every machine; it may share the aggregate's memory.

        Its shape is (layout.size,), or with fragments that of the round's. terms: of the members, in the order of the
        record. round: of the state that the update is a step from. Raises ValueError if it is no aggregate of these.
        """
        ...


class DenseForm:
    """The weighted mean as little-endian float32 values."""

    def __init__(self, layout: Layout, fragments: int = 1) -> None:
        self._size, self._fragments = layout.size, fragments

    def max_bytes(self, members: int) -> int:
        """See Form."""
        return FLOAT.itemsize * -(-self._size // self._fragments)

    def vector(self, aggregate: BytesLike, terms: Sequence[Term], round: int) -> Vector:  # noqa: A002 - the word
        """See Form."""
        view = memoryview(aggregate)
        first, last = span_of(self._size, self._fragments, round)
        if view.nbytes != FLOAT.itemsize * (last - first):
            raise ValueError(f"an aggregate of {last - first} values does not have {view.nbytes} bytes")
        vector: Vector = np.frombuffer(view, FLOAT)
        if not np.isfinite(vector).all():
            raise ValueError("an aggregate holds a number that is not finite")
        return vector


class SparseForm:
    """The members' sparse updates as a msgpack list, in the order of the record."""

    def __init__(self, layout: Layout) -> None:
        self.codec = SparseCodec(layout)
        self._size = layout.size
        self._decoded: dict[bytes, SparseUpdate] = {}  # of the last exchange, by digest

    def max_bytes(self, members: int) -> int:
        """See Form."""
        return members * (self.codec.max_bytes + _FRAMING_BYTES) + _FRAMING_BYTES

    def pack(self, payloads: Sequence[BytesLike]) -> bytes:
        """The aggregate of these updates."""
        packed: bytes = msgpack.packb([bytes(payload) for payload in payloads])
        return packed

    def refusals(self, payloads: Sequence[bytes]) -> dict[int, str]:
        """What is wrong with those that are no updates, by their place.

        To decode is dear, and `vector` is about to need the same again: it is kept for that, until the next call.
        """
        decoded, wrong = {}, {}
        for place, payload in enumerate(payloads):
            try:
                decoded[blake3(payload).digest()] = self.codec.decode(payload)
            except ValueError as error:
                wrong[place] = str(error)
        self._decoded = decoded
        return wrong

    def vector(self, aggregate: BytesLike, terms: Sequence[Term], round: int) -> Vector:  # noqa: A002 - the word
        """See Form."""
        decoded, self._decoded = self._decoded, {}
        try:
            payloads = msgpack.unpackb(
                aggregate, max_array_len=len(terms), max_bin_len=self.codec.max_bytes, max_str_len=0, max_map_len=0
            )
        except Exception:  # noqa: BLE001 - msgpack raises many kinds on hostile bytes
            raise ValueError("an aggregate is not a list of updates") from None
        if not isinstance(payloads, list) or len(payloads) != len(terms):
            raise ValueError(f"an aggregate does not hold the updates of {len(terms)} members")
        for payload, term in zip(payloads, terms, strict=True):
            if not isinstance(payload, bytes) or blake3(payload).digest() != term.digest:
                raise ValueError("an aggregate holds an update that its member did not sign")
        updates = [
            decoded.get(term.digest) or self.codec.decode(payload)
            for payload, term in zip(payloads, terms, strict=True)
        ]
        return sparse_mean(updates, [term.samples for term in terms], self._size, divide_by="senders")
