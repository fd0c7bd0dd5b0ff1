"""The rounds of a peer as columns for a page: the newest whole, the older ones thinned.

What does not live here: reading the records (`feed`), and drawing them (the page).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from p2pllm.metrics import RoundRecord

WHOLE = 200
"""Newest rounds that are all there."""

THINNED = 1300
"""At most so many of the older ones."""

_SECONDS = {
    "compute": ("compute",),
    "roster": ("roster",),
    "exchange": ("exchange",),
    "vote": ("vote",),
    "apply": ("outer_step", "digest", "store", "log"),
    "validation": ("validation",),
}
PARTS = tuple(_SECONDS)
"""Parts of a round as a page shows them; each is the sum of some of `RoundRecord.seconds`."""

Columns = dict[str, Any]
"""One list a column, all of equal length, oldest first; "parts" has one list a part."""


class Row(NamedTuple):
    """One round; `parts` in the order of PARTS, in seconds."""

    round: int
    time: float
    loss: float
    validation_loss: float | None
    samples: int
    members: int
    round_s: float
    attempts: int
    sent: int
    received: int
    parts: tuple[float, ...]

    @classmethod
    def of(cls, record: RoundRecord) -> Row:
        """What a page shows of a round, rounded to what can be seen."""
        validation = record.validation_loss
        return cls(
            record.round,
            round(record.unix_time, 1),
            round(record.loss, 4),
            None if validation is None else round(validation, 4),
            record.samples,
            len(record.members),
            round(record.round_s, 3),
            record.attempts,
            record.bytes_sent,
            record.bytes_received,
            tuple(round(sum(record.seconds.get(name, 0.0) for name in names), 3) for names in _SECONDS.values()),
        )


class History:
    """The rounds of one peer. Of older ones a row stands for `stride` rounds: a validated one if there is any."""

    def __init__(self) -> None:
        self._old: list[Row] = []
        self._new: list[Row] = []
        self.stride = 1

    def add(self, row: Row) -> None:
        """Take the next round. One that was there before means that the branch became another one from there on."""
        if self._new and row.round <= self._new[-1].round:
            self._new = [old for old in self._new if old.round < row.round]
            self._old = [old for old in self._old if old.round < row.round]
        self._new.append(row)
        if len(self._new) > WHOLE:
            self._put_away(self._new.pop(0))

    def rows(self, after: int = 0) -> list[Row]:
        """Oldest first; with `after` those of later rounds."""
        return [row for row in (*self._old, *self._new) if row.round > after]

    def clear(self) -> None:
        """Begin anew."""
        self._old, self._new, self.stride = [], [], 1

    def _put_away(self, row: Row) -> None:
        _merge(self._old, row, self.stride)
        while len(self._old) > THINNED:
            self.stride *= 2
            thinned = list[Row]()
            for old in self._old:
                _merge(thinned, old, self.stride)
            self._old = thinned


def _merge(rows: list[Row], row: Row, stride: int) -> None:
    """Add a row, unless another one stands for its rounds; a validated one goes before others."""
    if not rows or rows[-1].round // stride != row.round // stride:
        rows.append(row)
    elif rows[-1].validation_loss is None and row.validation_loss is not None:
        rows[-1] = row


def columns(rows: Iterable[Row]) -> Columns:
    """Rows as columns."""
    table: Sequence[tuple[Any, ...]] = list(zip(*rows, strict=True)) or [() for _ in Row._fields]
    found: Columns = {name: list(column) for name, column in zip(Row._fields, table, strict=True)}
    parts = list(zip(*found["parts"], strict=True)) or [() for _ in PARTS]
    found["parts"] = {part: list(column) for part, column in zip(PARTS, parts, strict=True)}
    return found
