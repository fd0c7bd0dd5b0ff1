"""What a lab makes on this machine, written down before it is made, so that exactly that can be undone.

    /run/p2pllm-lab/<id>.jsonl     one ledger a lab (without root: in the user's runtime folder); its first line names
                                   the process that owns it, each further line one claim

Whoever ends a lab reads its ledger: the lab itself, its guard when the lab was killed, or the next lab's `sweep` when
the guard was killed, too. Nothing that is not in a ledger is ever touched. What does not live here: how to undo a
claim (`undo`), waiting for the death of a lab (`guard`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import platformdirs

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.undo import Claim, Kind, alive, birth, still_there, undo

SECOND_LOOK_S = 0.5
"""How long a command of the kind of `ip` may still run when whoever started it is dead."""

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
        line = json.dumps({"owner": os.getpid(), "birth": birth(os.getpid())}) + "\n"
        while True:
            claims = cls(folder / f"{secrets.token_hex(_ID_BYTES)}.jsonl")
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with claims.ledger.open("x") as file:
                    file.write(line)
                break
            except FileExistsError:
                continue  # a lab of that id
            except OSError as error:
                raise RunError(f"The lab cannot write its ledger in {folder}: {error.strerror or error}.") from None
        claims._guard = _start_guard(claims.ledger)
        return claims

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def name(self, suffix: str) -> str:
        """A name for something of this lab: p2pllm-<id>-<suffix>."""
        return f"p2pllm-{self.id}-{suffix}"

    def note(self, kind: Kind, what: str) -> str:
        """Write down what is about to be made, or a process (its id) that was just started; returns `what`.

        kind: process, namespace (its name), cgroup, mount or folder (a path; a folder goes with all that is in it).
        What a process starts in turn is found only in a claimed namespace or cgroup. Raises RunError.
        """
        claim = Claim(kind, what, birth(int(what)) if kind == "process" else "")
        line = json.dumps({"kind": claim.kind, "what": claim.what, "birth": claim.birth}) + "\n"
        try:
            handle = os.open(self.ledger, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"The lab's ledger {self.ledger} is gone: {error.strerror or error}.") from None
        try:
            os.write(handle, line.encode())  # one write: the line is there whole, before what it claims is made
        finally:
            os.close(handle)
        self._noted.append(claim)
        return what

    def release(self) -> list[str]:
        """Undo everything, newest first; returns what could not be undone, as sentences. Repeating it does no harm."""
        failed = release(self.ledger)
        if self._guard is not None:
            with contextlib.suppress(OSError):  # it was killed
                self._guard.communicate(b"done\n")
            self._guard = None
        return failed

    def left_over(self) -> list[str]:
        """What is still there of all that was noted, released or not: a short phrase each."""
        return [line for claim in self._noted for line in still_there(claim)]


def ledger_folder() -> Path:
    """Where the ledgers of this user's labs lie; emptied by a restart of the machine."""
    run = Path("/run")
    root = hasattr(os, "geteuid") and os.geteuid() == 0 and run.is_dir()
    return (run if root else Path(platformdirs.user_runtime_dir())) / "p2pllm-lab"


def sweep(folder: Path | None = None) -> list[str]:
    """Undo what labs left whose owner is dead; returns a phrase for each thing that was there or still is."""
    lines = []
    for ledger in sorted((folder or ledger_folder()).glob("*.jsonl")):
        owner = _owner(ledger)
        if owner is None or alive(*owner):
            continue
        lines += [f"{line} of lab {ledger.stem}" for claim in _read(ledger) for line in still_there(claim)]
        lines += release(ledger)
    return lines


def release(ledger: Path) -> list[str]:
    """Undo one lab's claims; returns what could not be undone, as sentences. The ledger goes when nothing is left."""
    with _locked(ledger) as there:
        if not there:
            return []
        failed = undo(_read(ledger))
        if not failed:
            ledger.unlink(missing_ok=True)
        return failed


def release_after_death(ledger: Path) -> None:
    """For the guard: undo the claims of a lab that has just died.

    A command that it had just started may do its work only now, so what carries the lab's id is looked for again.
    """
    claims = _read(ledger)
    release(ledger)
    time.sleep(SECOND_LOOK_S)
    undo([claim for claim in claims if ledger.stem in claim.what])


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


def _owner(ledger: Path) -> tuple[int, str] | None:
    """Process and birth of the owner; None while the ledger is just being made, or gone."""
    rows = _rows(ledger)
    return (int(rows[0]["owner"]), rows[0]["birth"]) if rows else None


def _start_guard(ledger: Path) -> subprocess.Popen[bytes]:
    """Its standard input ends when we do, however we end: nobody else inherits the other end."""
    return subprocess.Popen(
        [sys.executable, "-m", "p2pllm_peers.lab.cleanup.guard", str(ledger)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C in the terminal is not for it
    )
