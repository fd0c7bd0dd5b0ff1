"""Chunks: the digest of a state is that of a list of digests, so that each piece of it can be checked by itself.

A state is cut into chunks of at most CHUNK_BYTES, first params, then the moments; no chunk has bytes of two vectors.
A `ChunkPlan` is the header of a state and the digests of its chunks. Whoever knows the digest of a state can check a
plan that a stranger sent, and with it every chunk. What does not live here: files (`snapshot`, `incoming`), sending
(`rounds`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgpack
from blake3 import blake3

from p2pllm.errors import StateError
from p2pllm.state.header import lines_of, parse_header
from p2pllm.state.layout import Layout

if TYPE_CHECKING:
    from p2pllm.state.shared import SharedState

BytesLike = bytes | bytearray | memoryview

CHUNK_BYTES = 1 << 20
"""Part of the digest of a state: another value is another format of runs."""

_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 512  # packed; one that is right has less than 200
_MANY_BYTES = 1 << 20  # below this, waking threads costs more than hashing


def digest_of(data: BytesLike) -> bytes:
    """BLAKE3 of the bytes, 32 bytes."""
    many = memoryview(data).nbytes >= _MANY_BYTES
    digest: bytes = blake3(data, max_threads=blake3.AUTO if many else 1).digest()
    return digest


class Chunk(NamedTuple):
    """Where a chunk lies: bytes start to stop of a vector; `at` counts from the first byte of params."""

    vector: int  # index in Layout.vectors
    start: int
    stop: int
    at: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


def chunk_count(layout: Layout) -> int:
    """Chunks of a state of this layout."""
    return len(layout.vectors) * _chunks_a_vector(layout)


def chunk_of(layout: Layout, index: int) -> Chunk:
    """Where chunk `index` lies. Raises StateError if there is none."""
    if not 0 <= index < chunk_count(layout):
        raise StateError(f"A state of {chunk_count(layout)} chunks has no chunk {index}.")
    vector, number = divmod(index, _chunks_a_vector(layout))
    start = number * CHUNK_BYTES
    return Chunk(vector, start, min(start + CHUNK_BYTES, layout.nbytes), vector * layout.nbytes + start)


def chunks_of(layout: Layout) -> Iterator[Chunk]:
    """All chunks in their order."""
    return (chunk_of(layout, index) for index in range(chunk_count(layout)))


def _chunks_a_vector(layout: Layout) -> int:
    return -(-layout.nbytes // CHUNK_BYTES)


@dataclass(frozen=True)
class ChunkPlan:
    """The header of a state and the digest of each of its chunks, 32 bytes each."""

    layout: Layout
    header: dict[str, str | int]  # as SharedState.header gives it
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, state: SharedState) -> ChunkPlan:
        """The plan of a state, as it is now."""
        payload = state.payload()
        digests = (digest_of(payload[chunk.vector][chunk.start : chunk.stop]) for chunk in chunks_of(state.layout))
        return cls(state.layout, state.header(), tuple(digests))

    @functools.cached_property
    def digest(self) -> bytes:
        """The digest of the state, 32 bytes."""
        head = f"p2pllm state 3\n{' '.join(self.layout.vectors)}\n{lines_of(self.header)}"
        return digest_of(head.encode() + b"".join(self.digests))

    @property
    def round(self) -> int:
        """Outer steps behind the state."""
        return int(self.header["round"])

    def pack(self) -> bytes:
        """The one wire form: msgpack of the header and of all digests in one string."""
        packed: bytes = msgpack.packb([dict(sorted(self.header.items())), b"".join(self.digests)])
        return packed

    @classmethod
    def unpack(cls, data: bytes, layout: Layout) -> ChunkPlan:
        """The plan that `pack` wrote. It may be that of another state than wanted: compare `digest`.

        Raises StateError for anything but a plan of this layout, also for another spelling of one.
        """
        size = _DIGEST_BYTES * chunk_count(layout)
        if len(data) > size + _MAX_HEADER_BYTES:
            raise StateError(f"The plan of a state has {len(data)} bytes, but its layout makes about {size}.")
        try:
            # Unbounded, a few bytes could ask for a million empty places, each in one of the other's.
            header, joined = msgpack.unpackb(data, max_array_len=2, max_map_len=4, max_str_len=64, max_ext_len=0)
        except Exception:  # noqa: BLE001 - msgpack raises many kinds on hostile bytes
            raise StateError("The plan of a state is not a header and digests in msgpack.") from None
        if not isinstance(joined, bytes) or len(joined) != size:
            raise StateError(f"The plan of a state does not have the {chunk_count(layout)} digests of its layout.")
        parse_header(layout, header)
        plan = cls(layout, header, tuple(joined[at : at + _DIGEST_BYTES] for at in range(0, size, _DIGEST_BYTES)))
        if plan.pack() != data:
            raise StateError("The plan of a state is not in its canonical form.")
        return plan

    def fits(self, index: int, data: BytesLike) -> bool:
        """Whether `data` is chunk `index`, by size and digest."""
        if not 0 <= index < len(self.digests):
            return False
        return memoryview(data).nbytes == chunk_of(self.layout, index).size and digest_of(data) == self.digests[index]
