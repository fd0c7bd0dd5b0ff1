"""ErrorBuffer: what compression left out of earlier rounds, so that it is sent later instead of lost.

What does not live here: the compression itself (`sparse`), and when a round counts (`rounds`).
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import numpy as np
from blake3 import blake3

from p2pllm.averaging.sparse import SparseCodec, SparseUpdate
from p2pllm.averaging.tiles import Floats
from p2pllm.errors import StateError
from p2pllm.state.files import DiskFolder, explained
from p2pllm.state.layout import FLOAT

LARGEST = np.float32(1e30)
"""Largest magnitude that is taken in: even summed up over all rounds it is finite."""

_FORMAT = "p2pllm error feedback 1"

logger = logging.getLogger(__name__)


class ErrorBuffer:
    """The error of one peer, float32 (layout.size,). Each round: `compress`, then `commit` if it counts.

    `compress` leaves in the buffer all that it was given, also what the payload says. Only `commit`, to be called when
    a round with this payload counts, takes that out. So nothing is lost if it never does: after another `compress` or a
    restart, what was not committed is in the buffer, undiminished, and is sent with what comes next. It stays there
    when the peer moves to another branch of the log, as a pending update does: it is what this peer has yet to say.
    """

    def __init__(self, codec: SparseCodec, run_id: str, decay: float = 0.95) -> None:
        """decay: what remains of the error from one committed round to the next, at least 0 and below 1.

        Raises ValueError if it is not.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"The error's decay is {decay:g}, but must be at least 0 and below 1.")
        self._codec = codec
        self._run_id = run_id
        self._decay = np.float32(decay)
        self._error = np.zeros(codec.layout.size, FLOAT)
        self._sent: SparseUpdate | None = None
        self._is_due = False  # to decay: a round was committed since it last did
        self._changing = threading.Lock()

    @property
    def error(self) -> Floats:
        """What is to be sent yet, float32 (layout.size,), read-only; with what is compressed and not committed."""
        view = self._error.view()
        view.flags.writeable = False
        return view

    def compress(self, delta: Floats) -> bytes:
        """The payload of a round: decay the error, add `delta`, float32 (layout.size,), and encode the sum.

        It decays only if a round was committed since. A payload that was not committed before this counts as lost.
        Raises ValueError, and changes nothing, if `delta` has another shape or holds a number that is not finite or
        above LARGEST.
        """
        if delta.shape != self._error.shape or delta.dtype != FLOAT:
            raise ValueError(f"A change to be compressed is {delta.dtype} of shape {delta.shape}, not as its layout.")
        # not np.abs, which would take memory of a whole vector; NaN fails any comparison
        if delta.size and not (delta.min() >= -LARGEST and delta.max() <= LARGEST):
            raise ValueError("A change to be compressed holds a number that is not finite, or is far too large.")
        with self._changing:
            self._sent = None
            self._decay_if_due()
            np.add(self._error, delta, out=self._error)
            payload = self._codec.encode(self._error)
            self._sent = self._codec.decode(payload)
            return payload

    def commit(self) -> None:
        """The round with the last payload counts: take what it says out of the error. Does nothing a second time."""
        with self._changing:
            if self._sent is not None:
                self._error[self._sent.positions] -= self._sent.values
                self._sent, self._is_due = None, True

    def _decay_if_due(self) -> None:
        if self._is_due:
            np.multiply(self._error, self._decay, out=self._error)
            self._is_due = False

    def save(self, path: Path) -> None:
        """Write the error to a safetensors file; durable when this returns, and `path` is never half written.

        Save after `commit`: what is not committed is saved as not sent. A `compress` that runs in another thread ends
        first. Raises StateError if the disk fails.
        """
        with self._changing, explained(f"The error of compression cannot be saved in {path}", self._error.nbytes):
            self._decay_if_due()
            data = self._error.view(np.uint8).data
            DiskFolder(path.parent, read_only=False).put(path.name, [self._head(data), data])

    def load(self, path: Path) -> bool:
        """Take the error from a file that `save` wrote; whether there was one that fits.

        One that is damaged, or of another run or layout, cannot be read or is not there leaves the buffer empty and
        a line in the log.
        """
        self._error[:], self._sent, self._is_due = 0, None, False
        try:
            loaded = self._read(path)
        except FileNotFoundError:
            logger.info("There is no saved error of compression in %s; it starts from zero.", path)
            return False
        except (OSError, StateError) as error:
            logger.warning("The error of compression in %s is not used, it starts from zero: %s", path, error)
            return False
        self._error = loaded
        return True

    def _read(self, path: Path) -> Floats:
        size = len(self._head(b"")) + self._error.nbytes
        if path.stat().st_size != size:
            raise StateError(f"it has {path.stat().st_size} bytes instead of {size}.")
        raw = np.fromfile(path, np.uint8)
        at = raw.size - self._error.nbytes
        # All of the head follows from what we know and from the data, so there is nothing in it to be parsed.
        if raw[:at].tobytes() != self._head(raw[at:].data):
            raise StateError("it is damaged, or of another run or model.")
        loaded = raw[at:].view(FLOAT)
        if loaded.size and not np.isfinite(loaded).all():
            raise StateError("it holds a number that is not finite.")
        return loaded

    def _head(self, data: bytes | memoryview) -> bytes:
        """What comes before the data in a file with them; as long for any data."""
        size = self._error.size
        metadata = {
            "format": _FORMAT,
            "run_id": self._run_id,
            "layout": self._codec.layout.digest(),
            "check": blake3(data).hexdigest(),
        }
        error = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
        head = json.dumps({"__metadata__": metadata, "error": error}).encode()
        head += b" " * (-len(head) % 8)  # the format wants tensors aligned to 8 bytes
        return len(head).to_bytes(8, "little") + head
