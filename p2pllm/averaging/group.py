"""Group and ExchangeResult: what goes into one all-reduce and what comes out; and how the vector is cut.

Every number that frames the wire (spans, parts, their bytes) follows from the Group alone, so no length is
ever read from the network. What does not live here: moving bytes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from p2pllm.averaging.codecs import BLOCK, codec

MAX_MEMBERS = 256
"""Largest group; bounds the messages that name members."""

MAX_WEIGHT = 2.0**53
"""Largest weight: a count of samples that a float still holds exactly."""

GROUP_ID_BYTES = 32

_ALIGN = BLOCK
"""Spans start at multiples of this many elements: vectors split at cache lines, and codecs' blocks stay whole."""


@dataclass(frozen=True)
class Group:
    """What the members of one all-reduce agreed on before the first byte.

    Raises ValueError where a field cannot be used.
    """

    group_id: bytes
    """32 bytes, never used twice."""
    members: tuple[str, ...]
    """Peer ids, in roster order; this is the order of summation."""
    weights: tuple[float, ...]
    """Weight of each member, in samples; above zero, at most MAX_WEIGHT."""
    size: int
    """Elements of the vector."""
    codec: str = "fp32"
    """Name of the codec, see `codecs`; of no meaning where updates are gathered."""
    digests: tuple[bytes, ...] = ()
    """Of each member's update, 32 bytes; only needed where updates are gathered."""

    def __post_init__(self) -> None:
        if len(self.group_id) != GROUP_ID_BYTES:
            raise ValueError(f"A group id has {GROUP_ID_BYTES} bytes, not {len(self.group_id)}.")
        if not 1 <= len(self.members) <= MAX_MEMBERS or len(set(self.members)) != len(self.members):
            raise ValueError(f"A group has 1 to {MAX_MEMBERS} different members, not {len(self.members)}.")
        if len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.members)} members have {len(self.weights)} weights.")
        if not all(0 < weight <= MAX_WEIGHT for weight in self.weights):
            raise ValueError(f"Every weight is above zero and at most {MAX_WEIGHT:g}.")
        if self.size < 0:
            raise ValueError(f"A vector cannot have {self.size} elements.")
        codec(self.codec)

    def digest(self, part_elements: int, lane: int = 0) -> bytes:
        """32 bytes (BLAKE3) that differ wherever two members would not understand each other's bytes.

        lane: which of several streams between the same two members.
        """
        hasher = blake3(b"p2pllm/allreduce/1")
        hasher.update(self.group_id)
        hasher.update(struct.pack("<QQQ", self.size, part_elements, len(self.members)))
        for text in (self.codec, *self.members):
            encoded = text.encode()
            hasher.update(struct.pack("<Q", len(encoded)) + encoded)
        hasher.update(struct.pack(f"<{len(self.weights)}d", *self.weights))
        if lane:
            hasher.update(struct.pack("<Q", lane))
        return hasher.digest()

    def shares(self) -> list[np.float32]:
        """Weight of each member over the sum of all: divided as float64, rounded once to float32."""
        total = math.fsum(self.weights)
        return [np.float32(weight / total) for weight in self.weights]

    def span(self, index: int) -> range:
        """The elements that member `index` reduces: contiguous, in roster order, maybe empty."""
        blocks = -(-self.size // _ALIGN)
        base, extra = divmod(blocks, len(self.members))
        first = index * base + min(index, extra)
        last = first + base + (index < extra)
        return range(min(first * _ALIGN, self.size), min(last * _ALIGN, self.size))

    def parts(self, index: int, part_elements: int) -> list[slice]:
        """The span of member `index` in pieces of `part_elements`; the last may be smaller."""
        span = self.span(index)
        return [slice(at, min(at + part_elements, span.stop)) for at in range(span.start, span.stop, part_elements)]


@dataclass(frozen=True)
class ExchangeResult:
    """What became of one attempt, as seen by one member."""

    aggregate: NDArray[np.float32] | bytes | None = None
    """The same bytes wherever there is one: float32 (size,), the weighted mean, or as a `form` says. None after a
    failure."""
    failed: frozenset[str] = frozenset()
    """Members that caused the failure, as far as seen from here: silent, gone, or sending nonsense."""
    reason: str = ""
    """What was wrong with each of them, joined with "; "; empty if the attempt succeeded."""
    bytes_sent: int = 0
    bytes_received: int = 0
    accused: dict[str, frozenset[str]] = field(default_factory=dict)
    """Hearsay: member that gave up first -> members that it holds responsible; may be lies."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time: "total"; of it "connect" (until all streams stood), "encode", "decode" and "reduce"."""
