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
"""In a peer's folder: {"month": "2026-11", "bytes": of that month}."""

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
            self._month, self._saved = month, _read(own_file, month)
            self._before = self._saved - self._moved() * ON_THE_LINE
        own = round(self._before + self._moved() * ON_THE_LINE)
        if own - self._saved >= SAVE_BYTES:
            self.save(own)
        others = (path for path in self._folder.parent.parent.glob(f"*/*/{FILE}") if path != own_file)
        return own + sum(_read(path, month) for path in others)

    def save(self, own: int | None = None) -> None:
        """Keep what was counted; a disk that does not take it makes the count too small, and nothing worse."""
        if self._month:
            self._saved = round(self._before + self._moved() * ON_THE_LINE) if own is None else own
            with contextlib.suppress(StateError):
                write_whole(self._folder / FILE, json.dumps({"month": self._month, "bytes": self._saved}).encode())


def _read(path: Path, month: str) -> int:
    """Bytes of that month; 0 if the file is of another one, or none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_bytes())
        if found["month"] == month:
            return max(0, int(found["bytes"]))
    return 0
