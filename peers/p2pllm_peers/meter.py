"""Meter: how many bytes the peers of this machine have moved this month, each in a file of its own.

What does not live here: what follows from it (`guest`), and how fast bytes may move (`p2pllm.network.pacing`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from p2pllm.errors import StateError
from p2pllm.network.pacing import ON_THE_LINE
from p2pllm_peers.folders import write_whole

FILE = "traffic.json"
"""In a peer's folder: {"2026-11": bytes of that month, ...}."""

MONTHS = 12
"""So many are kept: a clock that is wrong for a while must not cost us the count of this month."""

SAVE_BYTES = 1_000_000
"""As much may be forgotten when a daemon is killed."""


class Meter:
    """Of one peer; it reads those of the others."""

    def __init__(self, folder: Path, moved: Callable[[], int]) -> None:
        """folder: the peer's, <home>/runs/<run>/<name>. moved: payload bytes since the daemon began, both ways."""
        self._folder, self._moved = folder, moved
        self._month, self._saved = "", 0
        self._before = 0.0  # what this month had when we began, less what had been moved by then

    def used(self, now: datetime) -> float:
        """Bytes on the line this month, by all peers of this machine. now: local time."""
        month, own_file = f"{now:%Y-%m}", self._folder / FILE
        if month != self._month:
            self._month, self._saved = month, _read(own_file).get(month, 0)
            self._before = self._saved - self._moved() * ON_THE_LINE
        own = round(self._before + self._moved() * ON_THE_LINE)
        if own - self._saved >= SAVE_BYTES:
            self.save(own)
        others = (path for path in self._folder.parent.parent.glob(f"*/*/{FILE}") if path != own_file)
        return own + sum(_read(path).get(month, 0) for path in others)

    def save(self, own: int | None = None) -> None:
        """Keep what was counted; a disk that does not take it makes the count too small, and nothing worse."""
        if self._month:
            self._saved = round(self._before + self._moved() * ON_THE_LINE) if own is None else own
            months = _read(self._folder / FILE)
            for old in sorted(set(months) - {self._month})[: -(MONTHS - 1)]:
                del months[old]
            with contextlib.suppress(StateError):
                write_whole(self._folder / FILE, json.dumps({**months, self._month: self._saved}).encode())


def _read(path: Path) -> dict[str, int]:
    """Bytes by month; empty if there is no such file, or it is broken."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return {month: max(0, int(count)) for month, count in json.loads(path.read_bytes()).items()}
    return {}
