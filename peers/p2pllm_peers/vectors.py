"""Vectors: the memory that a daemon shares with its worker, one for each worker.

A file without a name holds 2 * parameters float32 values: the parameters, and behind them the update. What does not
live here: the worker's end of it (`worker`) and who may write when (`compute`).
"""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from p2pllm.state import FLOAT, Layout


class SharedVectors:
    """The daemon's end. `params` and `update`, float32 of shape (layout.size,), are there once `map` was called."""

    params: np.ndarray
    update: np.ndarray

    def __init__(self) -> None:
        self.handle = shared_file()
        """Descriptor, which the worker gets under the same number."""

    def map(self, layout: Layout) -> None:
        """See them as vectors of this layout. The file must have its size, of a worker or of `fit`."""
        both = np.frombuffer(mmap.mmap(self.handle, 2 * layout.nbytes), dtype=FLOAT)
        self.params, self.update = both[: layout.size], both[layout.size :]

    def fit(self, layout: Layout) -> None:
        """Give the file the size for this layout, and map it; new values are 0."""
        os.ftruncate(self.handle, 2 * layout.nbytes)
        self.map(layout)

    def close(self) -> None:
        """Give the memory back, as soon as nobody maps it."""
        os.close(self.handle)


def shared_file() -> int:
    """Descriptor of a file that has no name, so that nothing is left of it however the processes end."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("p2pllm")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
