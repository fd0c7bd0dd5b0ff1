"""Housekeeping: what this machine keeps, how large it is, and what may go.

What does not live here: asking the user (the commands) and where things lie (`folders`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from p2pllm.errors import DaemonError, P2PLLMError, StateError
from p2pllm.metrics import record_files
from p2pllm_peers.folders import PeerFolder, RunFolder, all_runs
from p2pllm_peers.service import manager


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
    """What comes back by itself when it is needed: tokenised text that no running peer reads, of whatever home."""
    if any(peer.running() is not None for run in all_runs(home) for peer in run.peers()):
        return []
    files = [file for file in sorted(cache.glob("*.tokens")) if not _is_read(file)]
    return [Held(file, "tokenised text; it is made again when a peer starts", file.stat().st_size) for file in files]


def _is_read(file: Path) -> bool:
    """Whether a peer reads it, or may: where that cannot be told it is left alone."""
    try:
        with file.open("r+b") as tokens:  # NFS locks nothing that was opened to be read
            fcntl.flock(tokens, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def whole_run(run: RunFolder) -> Held:
    """A run with all that its peers here know of it. Raises DaemonError while one of them runs, or is a service."""
    for peer in manager().installed():
        if peer.run.path == run.path.absolute():
            which = f"--run {run.run_id[:16]} --name {peer.name}"
            raise DaemonError(
                f"'{peer.name}' is a service, which would go on starting it; `p2pllm service remove {which}` first, "
                f"then its files can go."
            )
    for peer in run.peers():
        if peer.running() is not None:
            raise DaemonError(
                f"'{peer.name}' takes part in run {run.run_id[:16]} now; `p2pllm leave` first, then its files can go."
            )
    rounds = [found for peer in run.peers() if (found := last_round(peer)) is not None]
    reached = f" at round {max(rounds)}" if rounds else ""
    what = f"run {run_name(run) or run.run_id[:16]}{reached}: its log and its model; without other peers it is lost"
    return Held(run.path, what, size_of(run.path))


def remove_run(run: RunFolder) -> None:
    """Delete a run as a whole. Raises OccupiedError if a peer of it was started meanwhile, and StateError."""
    with contextlib.ExitStack() as locks:
        for peer in run.peers():
            locks.callback(os.close, peer.lock())  # so that none starts in the middle of it
        _delete(run.path)


def remove(held: Held) -> None:
    """Delete a file that comes back by itself, with its index, unless it is read. Raises StateError if it stays."""
    if _is_read(held.path):
        raise StateError(f"{held.path} cannot be deleted: a peer that was started meanwhile reads it.")
    _delete(held.path)
    _delete(held.path.with_suffix(".json"))


def _delete(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"{error.filename or path} cannot be deleted: {error.strerror}.") from None
