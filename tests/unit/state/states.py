"""States that the tests of `state` share, and places to keep them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from p2pllm.state import (
    CHUNK_BYTES,
    FLOAT,
    ChunkPlan,
    Incoming,
    Layout,
    SharedState,
    Snapshot,
    SnapshotStore,
    chunk_of,
    files,
)

RUN = "ab" * 32
LAYOUT = Layout.of([("weight", (30, 40)), ("bias", (40,))])  # one chunk a vector
LARGE = Layout.of([("weight", (700, 800)), ("bias", (3,))])  # three chunks a vector, the last ones short
TINY = Layout.of([("weight", (3, 4)), ("bias", (4,))])

assert 2 * CHUNK_BYTES < LARGE.nbytes < 3 * CHUNK_BYTES


def state_of(round_: int, layout: Layout = LAYOUT) -> SharedState:
    values = np.random.default_rng(round_).standard_normal((3, layout.size)).astype(FLOAT)
    return SharedState(layout, [values[0], values[1], values[2] ** 2], round=round_)


def record_of(round_: int) -> bytes:
    """Any digest; the stores do not look into records."""
    return bytes([round_]) * 32


def chunks_in(state: SharedState) -> list[bytes]:
    plan, payload = ChunkPlan.of(state), state.payload()
    places = [chunk_of(state.layout, index) for index in range(len(plan.digests))]
    return [bytes(payload[place.vector][place.start : place.stop]) for place in places]


def download(store: SnapshotStore, state: SharedState, record: bytes, only: range | None = None) -> Incoming:
    """A download of the chunks in `only`, or of all that are missing."""
    incoming = store.incoming(ChunkPlan.of(state), record)
    chunks = chunks_in(state)
    for index in only if only is not None else incoming.missing():
        assert incoming.put(index, chunks[index])
    return incoming


def save(store: SnapshotStore, *rounds: int, layout: Layout = LAYOUT) -> list[Snapshot]:
    return [store.save(state_of(round_, layout), record_of(round_)) for round_ in rounds]


def fail_at(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    """Have the system call fail as on a bad disk."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*(Path, call) if call == "replace" else (files.os, call), fail)
