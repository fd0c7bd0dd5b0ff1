"""Housekeeping: what this machine keeps, how large it is, and what may go.

What does not live here: asking the user (the commands) and where things lie (`folders`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from p2pllm.errors import DaemonError, P2PLLMError, StateError
from p2pllm.metrics import record_files
from p2pllm_peers.folders import PeerFolder, RunFolder, all_runs


@dataclass(frozen=True)
class Held:
    """One thing on disk that may go."""

    path: Path
    what: str
    """What it is, and what it costs to be without it."""
    size: int
    """Bytes."""


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # it has just gone
                total += (Path(folder) / name).lstat().st_size
    return total


def last_round(peer: PeerFolder) -> int | None:
    """The last round that a peer recorded; None if there is none."""
    for path in record_files(peer.path / "rounds.jsonl"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            with path.open("rb") as lines:
                return int(json.loads(deque(lines, maxlen=1)[0])["round"])
    return None


def run_name(run: RunFolder) -> str:
    """What the run's manifest calls it; empty if that is damaged."""
    with contextlib.suppress(P2PLLMError):
        if (loaded := run.load()) is not None:
            return loaded[0].name
    return ""


def needless(home: Path, cache: Path) -> list[Held]:
    """What comes back by itself when it is needed: tokenised text that no running peer reads."""
    if any(peer.running() is not None for run in all_runs(home) for peer in run.peers()):
        return []
    files = sorted(cache.glob("*.tokens"))
    return [Held(file, "tokenised text; it is made again when a peer starts", file.stat().st_size) for file in files]


def whole_run(run: RunFolder) -> Held:
    """A run with all that its peers here know of it. Raises DaemonError while one of them runs."""
    for peer in run.peers():
        if peer.running() is not None:
            raise DaemonError(
                f"'{peer.name}' takes part in run {run.run_id[:16]} now; `p2pllm leave` first, then its files can go."
            )
    rounds = [found for peer in run.peers() if (found := last_round(peer)) is not None]
    reached = f" at round {max(rounds)}" if rounds else ""
    what = f"run {run_name(run) or run.run_id[:16]}{reached}: its log and its model; without other peers it is lost"
    return Held(run.path, what, size_of(run.path))


def remove(held: Held) -> None:
    """Delete it. Raises StateError if that is not possible."""
    try:
        if held.path.is_dir():
            shutil.rmtree(held.path)
        else:
            held.path.unlink(missing_ok=True)
            held.path.with_suffix(".json").unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"{error.filename or held.path} cannot be deleted: {error.strerror}.") from None
