"""Incoming: a state that arrives from other peers chunk by chunk, each checked before it is written.

It grows in a draft beside the snapshots. If the download is broken off, also by a crash, the next one for the same
state goes on with the chunks that are there. What does not live here: asking peers for chunks (`rounds`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from p2pllm.errors import StateError
from p2pllm.state.chunks import BytesLike, ChunkPlan, chunk_of, chunks_of
from p2pllm.state.files import Folder, explained
from p2pllm.state.saved import Head, Snapshot

_PREFIX, _SUFFIX = ".incoming-", ".part"


def is_draft(name: str) -> bool:
    """Whether a file is the draft of a download."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def draft_of(state: bytes) -> str:
    """Name of the draft of the state with this digest."""
    return f"{_PREFIX}{state.hex()[:16]}{_SUFFIX}"


class Incoming:
    """A download into a folder of snapshots; SnapshotStore.incoming makes it.

    If the disk fails, every method raises StateError and the draft is gone. It takes one chunk of memory.
    """

    def __init__(self, folder: Folder, head: Head, plan: ChunkPlan) -> None:
        """Take up the draft of this state if there is one, which reads all of it; else reserve the room for it.

        plan: verified against the digest of the state that is wanted. head: of the file that it becomes.
        """
        self._folder, self._head, self._plan = folder, head, plan
        self._draft = draft_of(plan.digest)
        packed = head.pack()
        self._vectors_at = len(packed)
        with self._or_discard():
            there = folder.allocate(self._draft, self._size)
            folder.write(self._draft, 0, packed)
            self._missing = set(range(len(plan.digests))) - (self._present() if there else set())

    def missing(self) -> list[int]:
        """Chunks that are still to come, in their order."""
        return sorted(self._missing)

    def put(self, index: int, data: BytesLike) -> bool:
        """Take a chunk. False, and nothing is written, if it is not what the plan says."""
        if not self._plan.fits(index, data):
            return False
        if index in self._missing:
            with self._or_discard():
                self._folder.write(self._draft, self._vectors_at + chunk_of(self._plan.layout, index).at, data)
            self._missing.discard(index)
        return True

    def finish(self) -> Snapshot:
        """Make the snapshot of it when nothing is missing; the file is what `save` would have written.

        Raises StateError, and keeps the draft, if chunks are missing.
        """
        if self._missing:
            raise StateError(
                f"Of the state of round {self._plan.round} {len(self._missing)} of {len(self._plan.digests)} chunks "
                "are missing."
            )
        with self._or_discard():
            self._folder.publish(self._draft, self._head.snapshot.name)
        return self._head.snapshot

    def discard(self) -> None:
        """Give the download up and remove its draft. Without it the draft waits for the next download."""
        with contextlib.suppress(OSError):
            self._folder.remove(self._draft)

    @property
    def _size(self) -> int:
        return self._vectors_at + sum(chunk.size for chunk in chunks_of(self._plan.layout))

    def _present(self) -> set[int]:
        """What is in the draft already: a crash may have left any of it unwritten, so the digests decide."""
        present = set[int]()
        with self._folder.open(self._draft) as file:
            if file is None:
                return present
            for index, chunk in enumerate(chunks_of(self._plan.layout)):
                if self._plan.fits(index, file.read(self._vectors_at + chunk.at, chunk.size)):
                    present.add(index)
        return present

    @contextlib.contextmanager
    def _or_discard(self) -> Iterator[None]:
        """A disk that is full must not stay full because of us."""
        what = f"The state of round {self._plan.round} from other peers cannot be kept in {self._folder}"
        try:
            with explained(what, self._size):
                yield
        except StateError:
            self.discard()
            raise
