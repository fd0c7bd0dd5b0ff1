"""RoundLog: the records of one peer on its disk, in one file that only grows.

The file is a row of frames: MAGIC, kind (1 byte), length of the payload (4, big endian), the payload, and 16 bytes of
the BLAKE3 of all but the magic. To open a log is to replay its frames, each of which says where the branch is:

- record: the branch leads to it, and through the one before it, which it names;
- head: the branch goes back to this place; what is above it is abandoned, and stays in the file;
- mended: a record of the branch that was found damaged, again;
- checkpoint: one that the organiser signed.

So damage costs the rounds that it hits and no others: those are missing until somebody gives them back. What does not
live here: which records are right and which branch to follow (`chain`), votes, which the caller has checked, and the
states that the records lead to.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import msgpack
from blake3 import blake3

from p2pllm.errors import StateError
from p2pllm.rounds.chain import Branch, check_links
from p2pllm.rounds.packing import Digest, Message, MessageError, RoundNumber, Total
from p2pllm.rounds.record import MAX_RECORD_BYTES, Checkpoint, Head, Record, genesis

MAGIC = b"\xf5p2L"
KEPT_CHECKPOINTS = 64
KEPT_ABANDONED = 1000

_RECORD, _HEAD, _CHECKPOINT, _MENDED = 1, 2, 3, 4
_HEADER, _CHECK = 9, 16  # bytes before and after the payload of a frame
_MAX_FRAME = _HEADER + MAX_RECORD_BYTES + _CHECK
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MISSING = -1

logger = logging.getLogger(__name__)


class _Place(NamedTuple):
    """A round of the branch, as far as it is known."""

    digest: bytes = b""  # of its record; empty: nothing that is left names it
    total: int = 0  # samples up to it
    at: int = _MISSING  # where the store has its frame

    @property
    def is_named(self) -> bool:
        """Whether we know which record is missing here."""
        return self.at == _MISSING and bool(self.digest)


class _HeadFrame(Message):
    """Where the branch went back to."""

    round: RoundNumber
    digest: Digest
    total: Total


class RoundLog:
    """The records of one branch of a run, of those that it left, and checkpoints.

    Calls may come from several threads. Who reads does not wait for who writes, and sees the log before or after.
    Memory: about 200 bytes a round, and the records themselves if there is no file.
    """

    def __init__(self, path: Path | None, run_id: str, founder: str, read_only: bool = False) -> None:
        """Open the log in the file `path`, or make one; None keeps it in memory.

        read_only: the file is left as it is, whoever else writes it; without one the log is empty.
        Raises StateError if the file cannot be read or written, or belongs to another run.
        """
        self._run_id, self._run, self._founder = run_id, bytes.fromhex(run_id), founder
        self._places = [_Place(genesis(run_id)[1])]  # by round
        self._abandoned = deque[Head](maxlen=KEPT_ABANDONED)
        self._checkpoints = dict[Head, Checkpoint]()
        self._writing = threading.Lock()
        self._store = _Memory() if path is None else _File(path, read_only)
        try:
            for at, kind, payload in self._store.frames():
                self._places = self._replayed(self._places, at, kind, payload)
        except BaseException:
            self._store.close()
            raise
        self._checkpoints = {head: point for head, point in self._checkpoints.items() if point.is_signed(founder)}
        if missing := sum(place.at == _MISSING for place in self._places[1:]):
            logger.warning("%d of %d rounds in %s are damaged and missing", missing, len(self._places) - 1, path)

    def close(self) -> None:
        """Let go of the file. The log is not to be used any more."""
        with self._writing:
            self._store.close()

    # -- what is known ---------------------------------------------------------------------------------------------

    @property
    def branch(self) -> Branch:
        """Our branch as other peers are told of it."""
        places = self._places
        head = len(places) - 1
        anchor = max((round_ for round_, digest in list(self._checkpoints) if self.has((round_, digest))), default=0)
        return Branch((head, places[head].digest), places[head].total, anchor)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest one that is known, on our branch or not; of two of a round the one of the smaller digest."""
        return min(list(self._checkpoints.values()), key=lambda point: (-point.round, point.record), default=None)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that are known, of our branch or not, oldest round first."""
        return [self._checkpoints[head] for head in sorted(self._checkpoints.copy())]

    def digest(self, round_: int) -> bytes | None:
        """Digest of the body of a round on our branch, of genesis for 0; None if it is not known."""
        places = self._places
        return places[round_].digest or None if 0 <= round_ < len(places) else None

    def has(self, head: Head) -> bool:
        """Whether this is a place of our branch; its record may be missing."""
        return self.digest(head[0]) == head[1]

    def record(self, round_: int) -> Record | None:
        """The record of a round on our branch; None if there is none or it is damaged. Raises StateError."""
        places = self._places
        return self._record(places, round_) if 0 < round_ < len(places) else None

    def records(self, first: int = 1) -> Iterator[Record | None]:
        """The records of our branch as it is now, from round `first`; None for those that are missing."""
        places = self._places
        for round_ in range(max(1, first), len(places)):
            yield self._record(places, round_)

    def missing(self) -> list[Head]:
        """Rounds of our branch whose record is gone, where what is left still names it; see `mend`.

        Where several in a row are gone only the last one is named, and what is below them is taken for our branch
        until they are mended, although damage may have swallowed that we left it.
        """
        return [(round_, place.digest) for round_, place in enumerate(self._places) if round_ and place.is_named]

    def abandoned(self) -> list[Head]:
        """Places of branches that we left, as we left them: the last KEPT_ABANDONED."""
        return [head for head in dict.fromkeys(list(self._abandoned)) if not self.has(head)]

    # -- for other peers -------------------------------------------------------------------------------------------

    def sample(self) -> list[Head]:
        """Places of our branch, at growing distances back from the head to genesis: at most 32."""
        places = self._places
        last = len(places) - 1
        rounds = [last - (1 << bit >> 1) for bit in range(31)]  # 0, 1, 2, 4, ... back
        return [(at, places[at].digest) for at in dict.fromkeys([*rounds, 0]) if 0 <= at <= last and places[at].digest]

    def common(self, heads: Sequence[Head]) -> Head:
        """The latest of `heads` that is on our branch; genesis if none is."""
        return max((head for head in heads if self.has(head)), default=genesis(self._run_id))

    def packed_after(self, base: Head, max_bytes: int) -> list[bytes]:
        """Packed records that follow `base` on our branch, oldest first; none if it is not on it.

        At most `max_bytes` in all, but at least one, and none beyond a missing one. Raises StateError.
        """
        found, size, places = list[bytes](), 0, self._places
        for round_ in range(base[0] + 1, len(places)) if self.has(base) else ():
            packed = self._read(places, round_)
            if packed is None or (found and size + len(packed) > max_bytes):
                break
            found.append(packed)
            size += len(packed)
        return found

    # -- changes ---------------------------------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Put the record of the next round on the disk.

        Raises ValueError if it does not follow our head, and StateError if the disk does not take it; nothing has
        changed then.
        """
        with self._writing:
            check_links([record], self.branch, self._run_id)
            self._write([(_RECORD, record.pack())])

    def switch(self, base: Head, records: Sequence[Record]) -> list[Record]:
        """Leave our branch at `base` for `records`, which follow it. Returns what is abandoned and not missing.

        Raises as `append` does, also if `base` is not on our branch. A crash may leave the first of `records` only.
        """
        with self._writing:
            if not self.has(base):
                raise ValueError(f"round {base[0]} is not on our branch as it is named")
            places, total = self._places, self._places[base[0]].total
            check_links(records, Branch(base, total, 0), self._run_id)
            kept = {record.head for record in records}
            above = [
                round_ for round_ in range(base[0] + 1, len(places)) if (round_, places[round_].digest) not in kept
            ]
            left = [record for round_ in above if (record := self._record(places, round_))]
            back = _HeadFrame(round=base[0], digest=base[1], total=total).pack()
            self._write([(_HEAD, back), *((_RECORD, record.pack()) for record in records)])
            return left

    def rewind(self, head: Head) -> list[Record]:
        """Go back to `head`; returns and raises as `switch`."""
        return self.switch(head, [])

    def mend(self, record: Record) -> bool:
        """Put a missing record back; False if it is not one that `missing` names. Raises StateError.

        Its predecessor may be missing, too, and has a name after this. Its votes are for the caller to check.
        """
        with self._writing:
            if not self.has(record.head) or not self._places[record.body.round].is_named:
                return False
            self._write([(_MENDED, record.pack())])
            return True

    def add_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Keep a checkpoint, one of the KEPT_CHECKPOINTS newest; whether it is new. Raises StateError.

        False, too, for one that the organiser did not sign for this run.
        """
        with self._writing:
            if len(self._checkpoints) >= KEPT_CHECKPOINTS and checkpoint.head < min(self._checkpoints):
                return False
            if checkpoint.head in self._checkpoints or checkpoint.run != self._run:
                return False
            if not checkpoint.is_signed(self._founder):
                return False
            self._write([(_CHECKPOINT, checkpoint.pack())])
            return True

    # -- frames and the index --------------------------------------------------------------------------------------

    def _write(self, frames: list[tuple[int, bytes]]) -> None:
        """All of them or none, on the disk before the index knows."""
        offsets = self._store.write([_frame(kind, payload) for kind, payload in frames])
        places = self._places
        for at, (kind, payload) in zip(offsets, frames, strict=True):
            places = self._replayed(places, at, kind, payload)
        self._places = places

    def _replayed(self, places: list[_Place], at: int, kind: int, payload: bytes) -> list[_Place]:
        """The places after a frame: the same list, or a shorter copy, since others may be reading the one there is."""
        try:
            if kind in (_RECORD, _MENDED):
                return self._placed(places, at, _Outline.of(payload), again=kind == _MENDED)
            if kind == _HEAD:
                head = _HeadFrame.unpack(payload)
                return self._led_to(places, at, head.round, head.digest, head.total)
            point = Checkpoint.unpack(payload)
            self._checkpoints[point.head] = point
            while len(self._checkpoints) > KEPT_CHECKPOINTS:
                del self._checkpoints[min(self._checkpoints)]
        except MessageError as error:
            logger.warning("Skipped the frame at byte %d of %s: %s", at, self._store, error)
        return places

    def _placed(self, places: list[_Place], at: int, record: _Outline, again: bool) -> list[_Place]:
        if record.run != self._run:
            raise StateError(f"The log of rounds {self._store} belongs to another run; move it away.")
        place = _Place(record.digest, record.total, at)
        base = (record.round - 1, record.previous, record.total - record.samples)
        # A mended record above all that is left of the branch was on it when it was written, as any other record.
        if not again or record.round >= len(places):
            places = self._led_to(places, at, *base)
            places.append(place)
        elif places[record.round].is_named and places[record.round].digest == record.digest:
            self._name(places, *base)
            places[record.round] = place
        return places

    def _led_to(self, places: list[_Place], at: int, round_: int, digest: bytes, total: int) -> list[_Place]:
        """The places when this was the head. Damage may have swallowed those before it, or a branch that they left."""
        if round_ - len(places) > at:  # each of those that are not there took more than a byte
            raise MessageError("it is too far from what is before it")
        if round_ + 1 < len(places):
            left = range(max(round_ + 1, len(places) - KEPT_ABANDONED), len(places))
            self._abandoned.extend((above, places[above].digest) for above in left if places[above].digest)
            places = places[: round_ + 1]
        places.extend([_Place()] * (round_ + 1 - len(places)))
        self._name(places, round_, digest, total)
        return places

    def _name(self, places: list[_Place], round_: int, digest: bytes, total: int) -> None:
        """The branch goes through this record; unless it is there already it is missing."""
        if places[round_].digest == digest:
            return
        if round_ == 0:
            raise MessageError("it does not begin where the run does")
        if places[round_].digest:
            self._abandoned.append((round_, places[round_].digest))
        places[round_] = _Place(digest, total)

    def _record(self, places: list[_Place], round_: int) -> Record | None:
        packed = self._read(places, round_)
        try:
            return None if packed is None else _parsed(packed)
        except MessageError:
            self._lose(places, round_)
            return None

    def _read(self, places: list[_Place], round_: int) -> bytes | None:
        """The packed record of a place, if it still is the one that we knew."""
        place = places[round_]
        if place.at == _MISSING:
            return None
        found = _payload(self._store.read(place.at))
        try:
            if found and found[0] in (_RECORD, _MENDED) and _Outline.of(found[1]).digest == place.digest:
                return found[1]
        except MessageError:
            pass
        self._lose(places, round_)
        return None

    def _lose(self, places: list[_Place], round_: int) -> None:
        logger.warning("Round %d in %s is damaged", round_, self._store)
        places[round_] = places[round_]._replace(at=_MISSING)


class _Outline(NamedTuple):
    """What the index needs of a packed record."""

    run: bytes
    round: int
    previous: bytes
    total: int
    samples: int
    digest: bytes

    @classmethod
    def of(cls, packed: bytes) -> Self:
        """Taken out of the fields without making a Record, which takes ten times as long. Raises MessageError."""
        try:
            body, _votes = msgpack.unpackb(packed, use_list=False)
            _version, run, round_, previous, total, members, *_ = body
            samples = sum(claim[1] for claim in members)
            digest = blake3(msgpack.packb(body)).digest()
        except (ValueError, TypeError, IndexError) as error:
            raise MessageError(f"it is not a record: {error}") from None
        if [type(value) for value in (round_, total, samples)] != [int] * 3 or round_ < 1:
            raise MessageError("it is not a record")
        return cls(run, round_, previous, total, samples, digest)


@functools.lru_cache(maxsize=64)
def _parsed(packed: bytes) -> Record:
    """By content, so that all logs of a process share the newest records, and none can have an old one."""
    return Record.unpack(packed)


def _frame(kind: int, payload: bytes) -> bytes:
    checked = bytes([kind]) + len(payload).to_bytes(4, "big") + payload
    return MAGIC + checked + blake3(checked).digest(_CHECK)


def _payload(data: bytes) -> tuple[int, bytes] | None:
    """Kind and payload of the frame that `data` begins with; None if it is no whole and undamaged one."""
    end = _HEADER + int.from_bytes(data[5:_HEADER], "big")
    if not data.startswith(MAGIC) or end + _CHECK > len(data):
        return None
    checked = data[len(MAGIC) : end]
    if blake3(checked).digest(_CHECK) != data[end : end + _CHECK]:
        return None
    return data[4], data[_HEADER:end]


class _Memory:
    """The frames of a log without a file."""

    def __init__(self) -> None:
        self._frames = list[bytes]()

    def __str__(self) -> str:
        return "memory"

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        yield from ()

    def write(self, frames: list[bytes]) -> list[int]:
        first = len(self._frames)
        self._frames.extend(map(_shared, frames))
        return list(range(first, len(self._frames)))

    def read(self, at: int) -> bytes:
        return self._frames[at]

    def close(self) -> None:
        pass


@functools.lru_cache(maxsize=256)
def _shared(frame: bytes) -> bytes:
    """One copy of what many simulated peers write."""
    return frame


class _File:
    """The frames of a log in a file; `at` is the byte where one begins."""

    def __init__(self, path: Path, read_only: bool) -> None:
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

    @contextlib.contextmanager
    def _sentence(self, problem: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"The log of rounds {self._path} {problem}"
            if error.errno in _FULL:
                raise StateError(
                    f"{what}: the disk or a quota is full; free 10 MB (what is in it is intact)."
                ) from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StateError(f"{what}: that is not permitted; allow it or choose another `home`.") from None
            raise StateError(f"{what}: {error.strerror or error}.") from None

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """(at, kind, payload) of all undamaged frames in order; then what is behind the last one is cut off."""
        if self._handle is None:
            return
        with self._sentence("cannot be read"), open(self._handle, "rb", 1 << 20, closefd=False) as file:
            at: int | None = 0
            while at is not None:
                file.seek(at)
                data = file.read(_HEADER)
                size = int.from_bytes(data[5:], "big")
                data += file.read(min(size + _CHECK, _MAX_FRAME - _HEADER))
                if found := _payload(data):
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
        """The frame at `at`, and maybe more."""
        with self._sentence("cannot be read"):
            if self._handle is None:
                raise OSError(errno.EBADF, "it was closed")
            return os.pread(self._handle, _MAX_FRAME, at)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


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
