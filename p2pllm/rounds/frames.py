"""Frames: how a log lies in its file, or in memory.

A frame is MAGIC, kind (1 byte), length of the payload (4, big endian), the payload, and 16 bytes of the BLAKE3 of all
but the magic. A file of frames only grows: it is read from its beginning, past damage, and what a crash has torn off
its end is cut away before more is written. What does not live here: what the payloads say (`index`, `log`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from p2pllm.errors import NoRoomError, StateError
from p2pllm.rounds.record import MAX_RECORD_BYTES

MAGIC = b"\xf5p2L"

RECORD, HEAD, CHECKPOINT, MENDED = 1, 2, 3, 4
"""Kinds, see `log`."""

_HEADER, _CHECK = 9, 16  # bytes before and after the payload
_MAX_FRAME = _HEADER + MAX_RECORD_BYTES + _CHECK
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


def frame(kind: int, payload: bytes) -> bytes:
    """The bytes of a frame."""
    checked = bytes([kind]) + len(payload).to_bytes(4, "big") + payload
    return MAGIC + checked + blake3(checked).digest(_CHECK)


def payload_of(data: bytes) -> tuple[int, bytes] | None:
    """Kind and payload of the frame that `data` begins with; None if it is no whole and undamaged one."""
    end = _HEADER + int.from_bytes(data[5:_HEADER], "big")
    if not data.startswith(MAGIC) or end + _CHECK > len(data):
        return None
    checked = data[len(MAGIC) : end]
    if blake3(checked).digest(_CHECK) != data[end : end + _CHECK]:
        return None
    return data[4], data[_HEADER:end]


class MemoryFrames:
    """The frames of a log without a file; `at` is the number of one."""

    def __init__(self) -> None:
        self._frames = list[bytes]()

    def __str__(self) -> str:
        return "memory"

    def all(self) -> Iterator[tuple[int, int, bytes]]:
        """Those that were there before this one was made: none."""
        yield from ()

    def write(self, frames: list[bytes]) -> list[int]:
        """As FileFrames does; it never fails."""
        first = len(self._frames)
        self._frames.extend(map(_shared, frames))
        return list(range(first, len(self._frames)))

    def read(self, at: int) -> bytes:
        """The frame at `at`."""
        return self._frames[at]

    def close(self) -> None:
        """Nothing to let go of."""


@functools.lru_cache(maxsize=256)
def _shared(frame: bytes) -> bytes:
    """One copy of what many simulated peers write."""
    return frame


class FileFrames:
    """The frames of a log in a file; `at` is the byte where one begins."""

    def __init__(self, path: Path, read_only: bool) -> None:
        """Open the file, or make one. read_only: one that is not there has no frames. Raises StateError."""
        self._path, self._read_only = path, read_only
        self._handle: int | None = None
        self._size = 0
        self._is_torn = False  # behind _size there may be something that is not of the log
        with self._sentence("cannot be opened"):
            if read_only:
                with contextlib.suppress(FileNotFoundError):
                    self._handle = os.open(path, os.O_RDONLY)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if is_new:
                _sync_folder(path.parent)

    def __str__(self) -> str:
        return str(self._path)

    def all(self) -> Iterator[tuple[int, int, bytes]]:
        """(at, kind, payload) of all undamaged frames in order; then what is behind the last one is cut off.

        Takes the memory of one frame. Raises StateError.
        """
        if self._handle is None:
            return
        with self._sentence("cannot be read"), open(self._handle, "rb", 1 << 20, closefd=False) as file:
            at: int | None = 0
            while at is not None:
                file.seek(at)
                data = file.read(_HEADER)
                size = int.from_bytes(data[5:], "big")
                data += file.read(min(size + _CHECK, _MAX_FRAME - _HEADER))
                if found := payload_of(data):
                    yield at, *found
                    at = self._size = at + len(data)
                else:
                    at = _next_magic(file, at + 1)
            torn = file.seek(0, os.SEEK_END) - self._size
            if torn and not self._read_only:
                logger.warning("Cut %d bytes off the end of %s that are no whole record", torn, self._path)
                os.ftruncate(self._handle, self._size)

    def write(self, frames: list[bytes]) -> list[int]:
        """Append all of them, whole and on the disk, or none. Returns where they begin. Raises StateError."""
        if self._handle is None or self._read_only:
            raise ValueError("a log that is closed or read only does not change")
        with self._sentence("does not take more"):
            try:
                if self._is_torn:
                    os.ftruncate(self._handle, self._size)
                self._is_torn = True
                data, end = memoryview(b"".join(frames)), self._size
                while data:
                    written = os.pwrite(self._handle, data, end)
                    data, end = data[written:], end + written
                os.fsync(self._handle)
                self._is_torn = False
            finally:
                if self._is_torn:
                    with contextlib.suppress(OSError):  # then the next write tries again, or the next one to open it
                        os.ftruncate(self._handle, self._size)
                        self._is_torn = False
        offsets = list(itertools.accumulate(map(len, frames), initial=self._size))
        self._size = offsets.pop()
        return offsets

    def read(self, at: int) -> bytes:
        """The frame at `at`, and maybe more. Raises StateError."""
        with self._sentence("cannot be read"):
            if self._handle is None:
                raise OSError(errno.EBADF, "it was closed")
            return os.pread(self._handle, _MAX_FRAME, at)

    def close(self) -> None:
        """Let go of the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @contextlib.contextmanager
    def _sentence(self, problem: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"The log of rounds {self._path} {problem}"
            if error.errno in _FULL:
                raise NoRoomError(
                    f"{what}: the disk or a quota is full; free 10 MB (what is in it is intact)."
                ) from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise NoRoomError(f"{what}: that is not permitted; allow it or choose another `home`.") from None
            raise StateError(f"{what}: {error.strerror or error}.") from None


def _sync_folder(folder: Path) -> None:
    """A power cut must not take the name of a new file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _next_magic(file: BinaryIO, at: int) -> int | None:
    """Where the next frame may begin, from byte `at` on."""
    while True:
        file.seek(at)
        block = file.read(1 << 16)
        if (found := block.find(MAGIC)) >= 0:
            return at + found
        if len(block) < len(MAGIC):
            return None
        at += len(block) - len(MAGIC) + 1
