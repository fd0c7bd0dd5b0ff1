"""Named files in one folder, or in memory with the same interface: what stands under a name is always whole.

A file is written under a draft's name and renamed when all of it is on the disk. Other processes may read, or remove,
what is there meanwhile; a file that is open stays readable. All failures of the disk are OSError here; `explained`
makes the one sentence of them. What does not live here: what the files mean (`blobs`, `snapshot`, `incoming`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from p2pllm.errors import NoRoomError, StateError
from p2pllm.state.chunks import BytesLike

DRAFT = ".tmp"
"""How the name of a draft of `put` ends; it starts with a dot and the name that it shall get."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Reader(Protocol):
    """A file that is open for reading."""

    size: int

    def read_into(self, at: int, target: memoryview) -> None:
        """Fill `target`, bytes, from byte `at` on. Raises StateError if the file ends before."""

    def read(self, at: int, size: int) -> BytesLike:
        """`size` bytes from byte `at` on. Raises StateError if the file ends before."""


class Folder(Protocol):
    """Files by name. str() says where, for sentences."""

    read_only: bool

    def names(self) -> list[str]:
        """Names of all files, drafts too; none if the folder does not exist."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""

    def open(self, name: str) -> contextlib.AbstractContextManager[Reader | None]:
        """A file to read; None if it is not there."""

    def put(self, name: str, parts: Sequence[BytesLike]) -> None:
        """Write a file, in the place of one of this name. It is durable when this returns."""

    def allocate(self, draft: str, size: int) -> bool:
        """Have a draft of `size` bytes; whether it was there. If not, it is made, of zeros."""

    def write(self, draft: str, at: int, data: BytesLike) -> None:
        """Write into a draft from byte `at` on."""

    def publish(self, draft: str, name: str) -> None:
        """Give a draft its final name. It is durable when this returns."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""


def folder_at(path: Path | None, read_only: bool) -> Folder:
    """The folder at `path`, which need not exist yet; None: in memory."""
    return MemoryFolder() if path is None else DiskFolder(path, read_only)


@contextlib.contextmanager
def explained(what: str, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into a StateError that starts with `what`. needed: bytes to be written; None: only read."""
    try:
        yield
    except OSError as error:
        kind = NoRoomError if error.errno in (*_FULL, *_FORBIDDEN) else StateError
        raise kind(f"{what}: {_reason(error, needed)}") from None


def _reason(error: OSError, needed: int | None) -> str:
    if error.errno in _FULL:
        room = math.ceil((needed or 0) / 1e6)
        return f"the disk or a quota is full; free {room} MB (what was saved earlier is intact)."
    if error.errno in _FORBIDDEN and needed is not None:
        return "writing there is not permitted; allow it or choose another folder as `home`."
    if error.errno in _FORBIDDEN:
        return "there is no permission to read it; allow it."
    return f"{error.strerror or error}."


class DiskFolder(Folder):
    """A folder of the file system. One process at a time may write to it."""

    def __init__(self, path: Path, read_only: bool) -> None:
        """read_only: every change raises StateError."""
        self.path = path
        self.read_only = read_only
        self._numbers = itertools.count()  # two threads may put one name at once

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        try:
            return sorted(file.name for file in self.path.iterdir())
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Reader | None]:
        try:
            handle = os.open(self.path / name, os.O_RDONLY)
        except FileNotFoundError:
            handle = None
        if handle is None:
            yield None
            return
        try:
            yield _DiskReader(handle)
        finally:
            os.close(handle)

    def put(self, name: str, parts: Sequence[BytesLike]) -> None:
        self._prepare()
        draft = self.path / f".{name}.{next(self._numbers)}{DRAFT}"
        try:
            with draft.open("wb") as stream:
                for part in parts:
                    stream.write(part)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(self.path / name)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        _sync_folder(self.path)

    def allocate(self, draft: str, size: int) -> bool:
        self._prepare()
        if self.size(draft) == size:
            return True
        self.remove(draft)
        with (self.path / draft).open("xb") as stream:
            if sys.platform == "darwin":
                stream.truncate(size)  # it has no call that reserves the room
            elif size:
                os.posix_fallocate(stream.fileno(), 0, size)
        return False

    def write(self, draft: str, at: int, data: BytesLike) -> None:
        self._check_writable()
        with (self.path / draft).open("r+b") as stream:
            stream.seek(at)
            stream.write(data)

    def publish(self, draft: str, name: str) -> None:
        self._check_writable()
        with (self.path / draft).open("r+b") as stream:
            os.fsync(stream.fileno())
        (self.path / draft).replace(self.path / name)
        _sync_folder(self.path)

    def remove(self, name: str) -> None:
        self._check_writable()
        (self.path / name).unlink(missing_ok=True)

    def _prepare(self) -> None:
        self._check_writable()
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            _sync_folder(self.path.parent)

    def _check_writable(self) -> None:
        if self.read_only:
            raise StateError(f"{self} was opened for reading only; have the daemon that owns it write there.")


class _DiskReader(Reader):
    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = os.fstat(handle).st_size

    def read(self, at: int, size: int) -> BytesLike:
        if at + size > self.size:
            raise StateError("it ends too early.")  # before memory is taken for a size that a damaged file claims
        data = bytearray(size)
        self.read_into(at, memoryview(data))
        return data

    def read_into(self, at: int, target: memoryview) -> None:
        done = 0
        while done < target.nbytes:
            count = os.preadv(self._handle, [target[done:]], at + done)
            if not count:
                raise StateError("it ends too early.")
            done += count


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class MemoryFolder(Folder):
    """Files in a dict, for peers that are simulated."""

    read_only = False

    def __init__(self) -> None:
        self._files: dict[str, bytes | bytearray] = {}

    def __str__(self) -> str:
        return "memory"

    def names(self) -> list[str]:
        return sorted(self._files)

    def size(self, name: str) -> int | None:
        data = self._files.get(name)
        return None if data is None else len(data)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Reader | None]:
        data = self._files.get(name)
        yield None if data is None else _MemoryReader(data)

    def put(self, name: str, parts: Sequence[BytesLike]) -> None:
        self._files[name] = b"".join(parts)  # of a single bytes object this is that object: peers share it

    def allocate(self, draft: str, size: int) -> bool:
        if self.size(draft) == size:
            return True
        self._files[draft] = bytearray(size)
        return False

    def write(self, draft: str, at: int, data: BytesLike) -> None:
        self._draft(draft)[at : at + len(data)] = data

    def publish(self, draft: str, name: str) -> None:
        self._files[name] = self._draft(draft)
        del self._files[draft]

    def remove(self, name: str) -> None:
        self._files.pop(name, None)

    def _draft(self, name: str) -> bytearray:
        data = self._files.get(name)
        if not isinstance(data, bytearray):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return data


class _MemoryReader(Reader):
    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data
        self.size = len(data)

    def read(self, at: int, size: int) -> BytesLike:
        if at + size > self.size:
            raise StateError("it ends too early.")
        return self._data[at : at + size]

    def read_into(self, at: int, target: memoryview) -> None:
        target[:] = self.read(at, target.nbytes)
