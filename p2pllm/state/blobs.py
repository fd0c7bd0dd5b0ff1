"""Blobs: bytes that are found by their digest and by nothing else, such as the aggregates of committed rounds.

Each is a file whose name is the BLAKE3 of what is in it, so that damage is noticed whenever one is read. What does not
live here: which ones are kept (`rounds`), states (`snapshot`).
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

from p2pllm.errors import StateError
from p2pllm.state.chunks import BytesLike, digest_of
from p2pllm.state.files import DRAFT, explained, folder_at

_NAME = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


class BlobStore:
    """A folder of blobs. Digests are 32 bytes; every method raises StateError if the disk fails."""

    def __init__(self, folder: Path | None, read_only: bool = False) -> None:
        """Open a folder, which need not exist yet, and clear away what a killed process left half written.

        folder: None keeps all in memory. read_only: for another process than the one that owns the folder; it may
        look while that one writes and drops.
        """
        self._folder = folder_at(folder, read_only)
        if not read_only:
            with explained(f"The folder of aggregates {self._folder} cannot be opened", 0):
                for name in self._folder.names():
                    if name.startswith(".") and name.endswith(DRAFT):
                        self._folder.remove(name)

    def put(self, digest: bytes, data: BytesLike) -> None:
        """Keep `data`, whose digest must be `digest`; it is durable when this returns.

        What is there already costs nothing. Raises StateError if the disk is full or does not let us write, and
        for data of another digest; what is there is then as it was.
        """
        size = memoryview(data).nbytes
        with self._reading():
            if self._folder.size(digest.hex()) == size:
                return
        if digest_of(data) != digest:
            raise StateError(f"{size} bytes to be kept as {digest.hex()[:16]} have another digest.")
        with explained(f"An aggregate of {size / 1e6:.1f} MB cannot be kept in {self._folder}", size):
            self._folder.put(digest.hex(), [data])

    def get(self, digest: bytes) -> memoryview | None:
        """The bytes, read-only, checked against the digest; None if they are not there.

        A damaged file is as good as none: it is logged and removed.
        """
        name = digest.hex()
        with self._reading():
            with self._folder.open(name) as file:
                if file is None:
                    return None
                data = file.read(0, file.size)
            if digest_of(data) == digest:
                return memoryview(data).toreadonly()
            logger.error("The aggregate %s in %s is damaged and is not used.", name, self._folder)
            if not self._folder.read_only:
                self._folder.remove(name)
        return None

    def has(self, digest: bytes) -> bool:
        """Whether it is there; only `get` tells whether it is undamaged."""
        with self._reading():
            return self._folder.size(digest.hex()) is not None

    def size(self, digest: bytes) -> int:
        """Bytes of a blob, 0 if it is not there."""
        with self._reading():
            return self._folder.size(digest.hex()) or 0

    def drop(self, digest: bytes) -> None:
        """Remove a blob, if it is there."""
        with explained(f"The aggregate {digest.hex()} cannot be removed from {self._folder}", 0):
            self._folder.remove(digest.hex())

    def digests(self) -> set[bytes]:
        """Of all blobs that are there."""
        with self._reading():
            return {bytes.fromhex(name) for name in self._folder.names() if _NAME.fullmatch(name)}

    def sizes(self) -> list[int]:
        """Bytes of each blob."""
        return [self.size(digest) for digest in self.digests()]

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"The aggregates in {self._folder} cannot be read")
