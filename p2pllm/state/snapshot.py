"""Snapshots: whole states in files, written atomically, verified when read, and served to others chunk by chunk.

What does not live here: the form of a file (`saved`), downloads (`incoming`), the log of rounds (`rounds`), exports for
people (`training.export`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from p2pllm.errors import StateError
from p2pllm.state.chunks import ChunkPlan, chunk_of, chunks_of, digest_of
from p2pllm.state.files import DRAFT, Reader, explained, folder_at
from p2pllm.state.incoming import Incoming, draft_of, is_draft
from p2pllm.state.layout import FLOAT, Layout
from p2pllm.state.saved import Head, Snapshot, prefix_of, vectors_at
from p2pllm.state.shared import SharedState

_PLANS = 4  # kept in memory: 32 bytes for each MB of a state

logger = logging.getLogger(__name__)


class SnapshotStore:
    """The snapshots of one run in a folder. Every method raises StateError if the disk fails."""

    def __init__(self, folder: Path | None, run_id: str, layout: Layout | None, read_only: bool = False) -> None:
        """Open a folder, which need not exist yet, and clear away what a killed `save` left half written.

        folder: None keeps all in memory. layout: None takes files of any. read_only: for another process than the
        one that owns the folder; it may read while that one writes and drops.
        """
        self._folder = folder_at(folder, read_only)
        self._run_id, self._layout = run_id, layout
        self._names = re.compile(re.escape(prefix_of(run_id)) + r"round-\d{8,10}-[0-9a-f]{16}\.safetensors")
        self._plans: dict[bytes, ChunkPlan] = {}
        self._planning = threading.Lock()
        self._skipped: set[str] = set()
        if not read_only:
            with explained(f"The folder of saved states {self._folder} cannot be opened", 0):
                self._clear(lambda name: name.startswith(f".{prefix_of(run_id)}") and name.endswith(DRAFT))

    def all(self) -> list[Snapshot]:
        """What is there, the newest round first. Reads only the beginning of each file.

        Damaged and foreign files are skipped, with one warning each in this module's logger.
        """
        with explained(f"The saved states in {self._folder} cannot be read"):
            heads = [self._look(name) for name in self._folder.names() if self._names.fullmatch(name)]
        found = [head.snapshot for head in heads if head is not None]
        return sorted(found, key=lambda snapshot: (-snapshot.round, snapshot.state))

    def save(self, state: SharedState, record: bytes) -> Snapshot:
        """Write a state and the digest, 32 bytes, of the record that it belongs to; durable when this returns.

        What is there already is not written again. Raises StateError if the disk is full or does not let us write;
        what was there before is then as it was.
        """
        plan = ChunkPlan.of(state)
        head = self._head_of(plan, record)
        name, packed, payload = head.snapshot.name, head.pack(), state.payload()
        size = len(packed) + sum(part.nbytes for part in payload)
        with explained(f"The state of round {state.round} cannot be saved in {self._folder}", size):
            if self._look(name) != head:
                self._folder.put(name, [packed, *payload])
        self._remember(plan)
        return head.snapshot

    def load(self, snapshot: Snapshot) -> SharedState:
        """The state, verified.

        Raises StateError if the file is damaged, and removes it then, or if it is not there any more.
        """
        with self._opened(snapshot) as file:
            head, vectors = _read_head(file, snapshot), []
            for number in range(len(head.layout.vectors)):
                vector = np.empty(head.layout.size, FLOAT)
                file.read_into(vectors_at(file) + number * head.layout.nbytes, vector.view(np.uint8).data)
                vectors.append(vector)
            state = SharedState.adopt(head.layout, head.header, vectors)
            plan = ChunkPlan.of(state)
            _check_digest(plan, snapshot)
        self._remember(plan)
        return state

    def plan(self, snapshot: Snapshot) -> ChunkPlan:
        """The digests of its chunks, verified. Reads the whole file, a chunk at a time, unless it did so lately.

        Raises StateError as `load` does.
        """
        with self._planning:  # many peers ask at once: read the file once for all of them
            if plan := self._plans.get(snapshot.state):
                return plan
            with self._opened(snapshot) as file:
                head, start = _read_head(file, snapshot), vectors_at(file)
                digests = (digest_of(file.read(start + chunk.at, chunk.size)) for chunk in chunks_of(head.layout))
                plan = ChunkPlan(head.layout, head.header, tuple(digests))
                _check_digest(plan, snapshot)
            self._remember(plan)
        return plan

    def chunk(self, snapshot: Snapshot, index: int) -> bytes | None:
        """Chunk `index`, verified; None if there is no such chunk, or the file is not there or damaged."""
        try:
            plan = self._plans.get(snapshot.state) or self.plan(snapshot)
            if not 0 <= index < len(plan.digests):
                return None
            with self._opened(snapshot) as file:
                chunk = chunk_of(plan.layout, index)
                data = bytes(file.read(vectors_at(file) + chunk.at, chunk.size))
                if not plan.fits(index, data):
                    raise StateError(f"its chunk {index} does not have the digest that it was saved with.")
                return data
        except StateError as error:
            logger.info("Cannot serve chunk %d of round %d: %s", index, snapshot.round, error)
            return None

    def drop(self, snapshot: Snapshot) -> None:
        """Remove a snapshot, if it is there."""
        with explained(f"The saved state {snapshot.name} cannot be removed from {self._folder}", 0):
            self._folder.remove(snapshot.name)

    def incoming(self, plan: ChunkPlan, record: bytes) -> Incoming:
        """Begin, or go on with, the download of a state; drafts of other states are removed.

        plan: the caller has compared its digest with the one that it wants. Raises StateError for another layout.
        """
        if self._layout is not None and plan.layout != self._layout:
            raise StateError("A state that other peers offer has another layout than this run's model.")
        with explained(f"A state from other peers cannot be kept in {self._folder}", 0):
            self._clear(lambda name: is_draft(name) and name != draft_of(plan.digest))
        self._remember(plan)
        return Incoming(self._folder, self._head_of(plan, record), plan)

    def _head_of(self, plan: ChunkPlan, record: bytes) -> Head:
        return Head(self._run_id, plan.layout, plan.header, plan.digest, record)

    def _look(self, name: str) -> Head | None:
        """The head of a file if it is one of ours and undamaged. Raises PermissionError."""
        try:
            with self._folder.open(name) as file:
                if file is None:
                    return None
                head = Head.read(file)
            self._check_ours(head)
            if head.snapshot.name != name:
                raise StateError("its name is not that of the state in it.")
        except PermissionError:
            raise  # starting from nothing because of it would throw the run's progress away
        except (OSError, StateError) as error:
            if name not in self._skipped:
                self._skipped.add(name)
                logger.warning("Skipped the saved state %s in %s: %s", name, self._folder, error)
            return None
        return head

    def _check_ours(self, head: Head) -> None:
        if head.run_id != self._run_id:
            raise StateError("it belongs to another run.")
        if self._layout is not None and head.layout != self._layout:
            raise StateError("it has another layout than this run's model.")

    @contextlib.contextmanager
    def _opened(self, snapshot: Snapshot) -> Iterator[Reader]:
        """The file of a snapshot. A StateError inside says that it is damaged: then it is removed."""
        what = f"The saved state of round {snapshot.round} in {self._folder}"
        with explained(f"{what} cannot be read"):
            with self._folder.open(snapshot.name) as file:
                if file is None:
                    raise StateError(f"{what} is not there any more; take another one.")
                try:
                    yield file
                except StateError as error:
                    logger.error("%s is damaged and is not used: %s", what, error)
                    self._remove_damaged(snapshot)
                    raise StateError(f"{what} is damaged: {error}") from None

    def _remove_damaged(self, snapshot: Snapshot) -> None:
        """Else it would be served, and a `save` of the same state would take it for done."""
        if not self._folder.read_only:
            with contextlib.suppress(OSError):
                self._folder.remove(snapshot.name)

    def _remember(self, plan: ChunkPlan) -> None:
        """Replaces the dict and never changes one, since other threads read it."""
        others = [other for other in self._plans.values() if other.digest != plan.digest]
        self._plans = {kept.digest: kept for kept in [*others[1 - _PLANS :], plan]}

    def _clear(self, unwanted: Callable[[str], bool]) -> None:
        for name in filter(unwanted, self._folder.names()):
            self._folder.remove(name)


def _check_digest(plan: ChunkPlan, snapshot: Snapshot) -> None:
    if plan.digest != snapshot.state:
        raise StateError("its content does not have the digest that was saved with it.")


def _read_head(file: Reader, snapshot: Snapshot) -> Head:
    head = Head.read(file)
    if head.state != snapshot.state:
        raise StateError("it holds another state than its name says.")
    return head
