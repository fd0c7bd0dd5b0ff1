"""RoundLog: the records of one peer on its disk, in one file of frames that only grows.

To open a log is to replay its frames, each of which says where the branch is:

- record: the branch leads to it, and through the one before it, which it names;
- head: the branch goes back to this place; what is above it is abandoned, and stays in the file;
- mended: a record of the branch that was found damaged, again;
- checkpoint: one that the organiser signed.

So damage costs the rounds that it hits and no others: those are missing until somebody gives them back. What does not
live here: the file (`frames`), the replay (`index`), which records are right and which branch to follow (`chain`),
votes, which the caller has checked, and the states that the records lead to.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from p2pllm.rounds.chain import Branch, check_links
from p2pllm.rounds.frames import (
    CHECKPOINT,
    HEAD,
    MAGIC,
    MENDED,
    RECORD,
    FileFrames,
    MemoryFrames,
    frame,
    payload_of,
)
from p2pllm.rounds.index import KEPT_ABANDONED, KEPT_CHECKPOINTS, MISSING, HeadFrame, Index, Outline, Place
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Checkpoint, Head, Record, genesis

__all__ = ["KEPT_ABANDONED", "KEPT_CHECKPOINTS", "MAGIC", "RoundLog"]

logger = logging.getLogger(__name__)


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
        self._writing = threading.Lock()
        self._store = MemoryFrames() if path is None else FileFrames(path, read_only)
        self._index = Index(run_id, str(self._store))
        try:
            self._index.replay(self._store.all())
        except BaseException:
            self._store.close()
            raise
        signed = {head: point for head, point in self._index.checkpoints.items() if point.is_signed(founder)}
        self._index.checkpoints = signed
        places = self._index.places
        if missing := sum(place.at == MISSING for place in places[1:]):
            logger.warning("%d of %d rounds in %s are damaged and missing", missing, len(places) - 1, path)

    def close(self) -> None:
        """Let go of the file. The log is not to be used any more."""
        with self._writing:
            self._store.close()

    # -- what is known ---------------------------------------------------------------------------------------------

    @property
    def branch(self) -> Branch:
        """Our branch as other peers are told of it."""
        places = self._index.places
        head = len(places) - 1
        anchor = max(
            (round_ for round_, digest in list(self._index.checkpoints) if self.has((round_, digest))), default=0
        )
        return Branch((head, places[head].digest), places[head].total, anchor)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest one that is known, on our branch or not; of two of a round the one of the smaller digest."""
        return min(list(self._index.checkpoints.values()), key=lambda point: (-point.round, point.record), default=None)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that are known, of our branch or not, oldest round first."""
        return [self._index.checkpoints[head] for head in sorted(self._index.checkpoints.copy())]

    def digest(self, round_: int) -> bytes | None:
        """Digest of the body of a round on our branch, of genesis for 0; None if it is not known."""
        places = self._index.places
        return places[round_].digest or None if 0 <= round_ < len(places) else None

    def has(self, head: Head) -> bool:
        """Whether this is a place of our branch; its record may be missing."""
        return self.digest(head[0]) == head[1]

    def record(self, round_: int) -> Record | None:
        """The record of a round on our branch; None if there is none or it is damaged. Raises StateError."""
        places = self._index.places
        return self._record(places, round_) if 0 < round_ < len(places) else None

    def records(self, first: int = 1) -> Iterator[Record | None]:
        """The records of our branch as it is now, from round `first`; None for those that are missing."""
        places = self._index.places
        for round_ in range(max(1, first), len(places)):
            yield self._record(places, round_)

    def missing(self) -> list[Head]:
        """Rounds of our branch whose record is gone, where what is left still names it; see `mend`.

        Where several in a row are gone only the last one is named, and what is below them is taken for our branch
        until they are mended, although damage may have swallowed that we left it.
        """
        return [(round_, place.digest) for round_, place in enumerate(self._index.places) if round_ and place.is_named]

    def abandoned(self) -> list[Head]:
        """Places of branches that we left, as we left them: the last KEPT_ABANDONED."""
        return [head for head in dict.fromkeys(list(self._index.abandoned)) if not self.has(head)]

    # -- for other peers -------------------------------------------------------------------------------------------

    def sample(self) -> list[Head]:
        """Places of our branch, at growing distances back from the head to genesis: at most 32."""
        places = self._index.places
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
        found, size, places = list[bytes](), 0, self._index.places
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
            self._write([(RECORD, record.pack())])

    def switch(self, base: Head, records: Sequence[Record]) -> list[Record]:
        """Leave our branch at `base` for `records`, which follow it. Returns what is abandoned and not missing.

        Raises as `append` does, also if `base` is not on our branch. A crash may leave the first of `records` only.
        """
        with self._writing:
            if not self.has(base):
                raise ValueError(f"round {base[0]} is not on our branch as it is named")
            places, total = self._index.places, self._index.places[base[0]].total
            check_links(records, Branch(base, total, 0), self._run_id)
            kept = {record.head for record in records}
            above = [
                round_ for round_ in range(base[0] + 1, len(places)) if (round_, places[round_].digest) not in kept
            ]
            left = [record for round_ in above if (record := self._record(places, round_))]
            back = HeadFrame(round=base[0], digest=base[1], total=total).pack()
            self._write([(HEAD, back), *((RECORD, record.pack()) for record in records)])
            return left

    def rewind(self, head: Head) -> list[Record]:
        """Go back to `head`; returns and raises as `switch`."""
        return self.switch(head, [])

    def mend(self, record: Record) -> bool:
        """Put a missing record back; False if it is not one that `missing` names. Raises StateError.

        Its predecessor may be missing, too, and has a name after this. Its votes are for the caller to check.
        """
        with self._writing:
            if not self.has(record.head) or not self._index.places[record.body.round].is_named:
                return False
            self._write([(MENDED, record.pack())])
            return True

    def add_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Keep a checkpoint, one of the KEPT_CHECKPOINTS newest; whether it is new. Raises StateError.

        False, too, for one that the organiser did not sign for this run.
        """
        with self._writing:
            if len(self._index.checkpoints) >= KEPT_CHECKPOINTS and checkpoint.head < min(self._index.checkpoints):
                return False
            if checkpoint.head in self._index.checkpoints or checkpoint.run != self._run:
                return False
            if not checkpoint.is_signed(self._founder):
                return False
            self._write([(CHECKPOINT, checkpoint.pack())])
            return True

    # -- frames ------------------------------------------------------------------------------------------------------

    def _write(self, frames: list[tuple[int, bytes]]) -> None:
        """All of them or none, on the disk before the index knows."""
        offsets = self._store.write([frame(kind, payload) for kind, payload in frames])
        self._index.replay((at, *written) for at, written in zip(offsets, frames, strict=True))

    def _record(self, places: list[Place], round_: int) -> Record | None:
        packed = self._read(places, round_)
        try:
            return None if packed is None else _parsed(packed)
        except MessageError:
            self._index.lose(places, round_)
            return None

    def _read(self, places: list[Place], round_: int) -> bytes | None:
        """The packed record of a place, if it still is the one that we knew."""
        place = places[round_]
        if place.at == MISSING:
            return None
        found = payload_of(self._store.read(place.at))
        try:
            if found and found[0] in (RECORD, MENDED) and Outline.of(found[1]).digest == place.digest:
                return found[1]
        except MessageError:
            pass
        self._index.lose(places, round_)
        return None


@functools.lru_cache(maxsize=64)
def _parsed(packed: bytes) -> Record:
    """By content, so that all logs of a process share the newest records, and none can have an old one."""
    return Record.unpack(packed)
