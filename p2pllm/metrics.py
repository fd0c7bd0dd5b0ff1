"""One stream of records: what a peer measured, one JSON object a line.

What lives here: the record of a round and its file. What does not: showing them (`p2pllm_cli`), what they are called in
other tools (`metric_names`), and getting them there (`sinks`).
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True)
class RoundRecord:
    """One committed round as this peer saw it. Times in seconds, losses in nats a token, digests in hex."""

    round: int  # rounds committed, this one included
    unix_time: float
    samples: int
    tokens: int
    members: dict[str, int]  # peer id -> samples, in roster order
    loss: float  # training loss over all members
    validation_loss: float | None
    learning_rate: float
    record_digest: str  # of the round's record in the log
    aggregate_digest: str
    state_digest: str
    attempts: int
    own_steps: list[int]  # samples of each of our micro-batches
    bytes_sent: int  # of the exchange, by this peer
    bytes_received: int
    seconds: dict[str, float] = field(default_factory=dict)  # a part of the round -> its time
    round_s: float = 0.0  # since this peer was at the round's start; what `seconds` does not explain was idle
    failures: list[str] = field(default_factory=list)  # what failed here in the round's attempts, a sentence each
    traffic: dict[str, int] = field(default_factory=dict)  # payload so far: <control|updates|state>_<sent|received>

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> RoundRecord:
        """The record of a line; what another version added to it is left out. Raises ValueError if it is none."""
        return _reader().validate_json(line)


FILE_BYTES, KEPT_FILES = 16_000_000, 4
"""Size at which a file of records is put away, and how many older ones are kept: tens of thousands of rounds."""


def record_files(path: Path) -> list[Path]:
    """The files in which the records of `path` may be, the newest first; not each of them need be there."""
    return [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT_FILES + 1))]


class JsonlSink:
    """Appends records to a file; a reader may follow it. A full one is put away as path.1, and so on."""

    def __init__(self, path: Path, file_bytes: int = FILE_BYTES) -> None:
        self._path, self._file_bytes = path, file_bytes
        self._file = self._opened()

    def write(self, record: RoundRecord) -> None:
        """Append one record as one line. Raises OSError."""
        if self._file.tell() >= self._file_bytes:
            self._put_away()
        self._file.write(record.to_json() + "\n")

    def _opened(self) -> TextIO:
        torn = _is_torn(self._path)
        file = self._path.open("a", encoding="utf-8", buffering=1)
        if torn:  # a killed process left half a line, which must not swallow the next one
            file.write("\n")
        return file

    def _put_away(self) -> None:
        """Go on in a new file. If the disk does not let us the old one takes records as before."""
        try:
            if self._path.exists():  # else it was put away before, and only the new one could not be made
                files = record_files(self._path)
                for newer, older in reversed(list(pairwise(files))):
                    if newer.exists():
                        newer.replace(older)
            full, self._file = self._file, self._opened()
        except OSError:
            return
        full.close()

    def close(self) -> None:
        """Close the file. What the disk did not take was reported by `write`."""
        with contextlib.suppress(OSError):
            self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether the file's last line has no end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


@cache
def _reader() -> TypeAdapter[RoundRecord]:
    from pydantic import TypeAdapter  # here, since a daemon only writes

    return TypeAdapter(RoundRecord)
