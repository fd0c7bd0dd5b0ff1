"""One stream of records: what a peer measured, one JSON object a line.

What lives here: the record of a round and its file. What does not: showing them (`p2pllm_cli`), what they are called in
other tools (`metric_names`), and getting them there (`sinks`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

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
    failures: list[str] = field(
        default_factory=list
    )  # why earlier attempts at the round failed here, one sentence each
    traffic: dict[str, int] = field(default_factory=dict)  # payload so far: <control|updates|state>_<sent|received>

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> RoundRecord:
        """The record of a line; what another version added to it is left out. Raises ValueError if it is none."""
        return _reader().validate_json(line)


class JsonlSink:
    """Appends records to a file; a reader may follow it."""

    def __init__(self, path: Path) -> None:
        torn = _is_torn(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:  # a killed process left half a line, which must not swallow the next one
            self._file.write("\n")

    def write(self, record: RoundRecord) -> None:
        """Append one record as one line."""
        self._file.write(record.to_json() + "\n")

    def close(self) -> None:
        """Flush and close the file."""
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
