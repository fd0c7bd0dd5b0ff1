"""What a lab makes on this machine, written down before it is made, so that exactly that can be undone.

    /run/p2pllm-lab/<id>.jsonl     one ledger a lab (without root: in the user's runtime folder); its first line names
                                   the processes of the lab and of its guard, each further line one claim

Whoever ends a lab reads its ledger: its guard, whether the lab has finished or was killed; the lab itself where the
guard was killed; the next lab's `sweep` where both were. Nothing that is not in a ledger is ever touched. What does
not live here: how to undo a claim (`undo`), running the commands that make what is claimed (`commands`), waiting for
the end of a lab (`guard`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import platformdirs

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.commands import hang_up, hold
from p2pllm_peers.lab.cleanup.undo import PATIENCE_S, Claim, Kind, alive, birth, still_there, undo

_ID_BYTES = 3


class Claims:
    """The ledger of one lab. `open` makes a new one and its guard; use it as a context, or call `release`."""

    def __init__(self, ledger: Path) -> None:
        self.ledger = ledger
        self.id = ledger.stem
        self._noted: list[Claim] = []
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def open(cls, folder: Path | None = None) -> Self:
        """A new lab with a short random id. Raises RunError if the ledger cannot be written."""
        folder = folder or ledger_folder()
        while True:
            claims = cls(folder / f"{secrets.token_hex(_ID_BYTES)}.jsonl")
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                claims.ledger.open("x").close()
                break
            except FileExistsError:
                continue  # a lab of that id
            except OSError as error:
                raise RunError(f"The lab cannot write its ledger in {folder}: {error.strerror or error}.") from None
        with contextlib.ExitStack() as unguarded:
            unguarded.callback(claims.ledger.unlink, missing_ok=True)
            guard = claims._guard = _start_guard(claims.ledger)
            keepers = {"owner": os.getpid(), "birth": birth(os.getpid())}
            claims._append(keepers | {"guard": guard.pid, "guard_birth": birth(guard.pid)})
            unguarded.pop_all()
        return claims

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def name(self, suffix: str = "") -> str:
        """A name for something of this lab: p2pllm-<id>-<suffix>, or p2pllm-<id>."""
        return "-".join(["p2pllm", self.id, *([suffix] if suffix else [])])

    def note(self, kind: Kind, what: str) -> str:
        """Write down what is about to be made, or a process (its id) that was just started; returns `what`.

        kind: process, namespace (its name), mount (its source, for its path may change), cgroup or folder (a path; a
        folder goes with all that is in it). What a process starts in turn is found only in a claimed namespace or
        cgroup. Commands that make something are for `commands.run`. Raises RunError.
        """
        claim = Claim(kind, what, birth(int(what)) if kind == "process" else "")
        self._append({"kind": claim.kind, "what": claim.what, "birth": claim.birth})
        self._noted.append(claim)
        return what

    def _append(self, row: dict[str, Any]) -> None:
        try:
            handle = os.open(self.ledger, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"The lab's ledger {self.ledger} is gone: {error.strerror or error}.") from None
        try:
            line = json.dumps(row).encode() + b"\n"
            os.write(handle, line)  # one write: the line is there whole, before what it claims is made
        finally:
            os.close(handle)

    def release(self) -> list[str]:
        """Have everything undone, newest first; returns what could not be, as sentences. Repeating it does no harm.

        The guard does it, because it knows when no command is under way any more.
        """
        guard, self._guard = self._guard, None
        if guard is not None and guard.stdin is not None:
            hang_up(guard.stdin)
            try:
                guard.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:  # a command is stuck; when it ends the guard looks again
                return release(self.ledger, for_good=False)
        return release(self.ledger)

    def left_over(self) -> list[str]:
        """What is still there of all that was noted, released or not: a short phrase each."""
        return [line for claim in self._noted for line in still_there(claim)]


def ledger_folder() -> Path:
    """Where the ledgers of this user's labs lie; emptied by a restart of the machine."""
    run = Path("/run")
    root = hasattr(os, "geteuid") and os.geteuid() == 0 and run.is_dir()
    return (run if root else Path(platformdirs.user_runtime_dir())) / "p2pllm-lab"


def sweep(folder: Path | None = None) -> list[str]:
    """Undo what labs left that no guard looks after; returns a phrase for each thing that was there or still is."""
    lines = []
    for ledger in sorted((folder or ledger_folder()).glob("*.jsonl")):
        keepers = _keepers(ledger)
        if not keepers or any(alive(*process) for process in keepers):
            continue
        lines += [f"{line} of lab {ledger.stem}" for claim in _read(ledger) for line in still_there(claim)]
        lines += release(ledger)
    return lines


def release(ledger: Path, *, for_good: bool = True) -> list[str]:
    """Undo one lab's claims; returns what could not be undone, as sentences.

    for_good: the ledger goes if nothing is left, so that nobody looks again.
    """
    with _locked(ledger) as there:
        if not there:
            return []
        failed = undo(_read(ledger))
        if not failed and for_good:
            ledger.unlink(missing_ok=True)
        return failed


@contextlib.contextmanager
def _locked(ledger: Path) -> Iterator[bool]:
    """Only one undoes a ledger at a time; False if there is none any more."""
    try:
        file = ledger.open("rb")
    except FileNotFoundError:
        yield False
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield ledger.exists()


def _rows(ledger: Path) -> list[dict[str, Any]]:
    """The whole lines; the last may be torn, and then what it claims was not made."""
    try:
        lines = ledger.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _read(ledger: Path) -> list[Claim]:
    return [Claim(row["kind"], row["what"], row["birth"]) for row in _rows(ledger)[1:]]


def _keepers(ledger: Path) -> list[tuple[int, str]]:
    """Process and birth of the lab and of its guard; none while the ledger is just being made, or gone."""
    first = _rows(ledger)[:1]
    return [pair for row in first for pair in ((row["owner"], row["birth"]), (row["guard"], row["guard_birth"]))]


def _start_guard(ledger: Path) -> subprocess.Popen[bytes]:
    """Its standard input ends when we and the commands that we run have ended, however we end."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "p2pllm_peers.lab.cleanup.guard", str(ledger)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C in the terminal is not for it
    )
    assert guard.stdin is not None  # noqa: S101 - it was asked for
    hold(guard.stdin)
    return guard
