"""Where a machine keeps the runs that it takes part in, and which peer of a run is meant.

    <home>/keys/<name>.key                          identity of the peers of that name, in every run
    <home>/runs/<run id>/manifest.json              the sealed manifest, with manifest.sig and tokenizer.json
    <home>/runs/<run id>/<name>/daemon.json         the running daemon: process id and socket
    <home>/runs/<run id>/<name>/daemon.lock         held while the daemon lives; its process id
    <home>/runs/<run id>/<name>/flags.json          settings that the peer was given, see `flags`
    <home>/runs/<run id>/<name>/{log,aggregates/,state/}       the run's rounds and states, see `rounds.disk`
    <home>/runs/<run id>/<name>/{daemon.log,rounds.jsonl[.1 to .4],peers.json,worker.json}
    <home>/runs/<run id>/<name>/{port,public}       where it listened last, and that it could be dialled from outside

One machine may hold several peers of one run under different names: `start` makes the peer "founder", `join`
makes "volunteer", and `--name` any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pllm.errors import ManifestError, NoRoomError, OccupiedError, P2PLLMError, StateError
from p2pllm.identity import verify
from p2pllm.manifest import RunManifest
from p2pllm.network.options import Reach

FOUNDER, VOLUNTEER = "founder", "volunteer"
SIGNING_DOMAIN = "manifest"
"""Domain of the founder's signature over a manifest's canonical bytes."""

_LOCK_TRIES, _LOCK_PAUSE_S = 5, 0.02


@dataclass(frozen=True)
class RunFolder:
    """The files that all peers of one run on this machine share."""

    home: Path
    run_id: str

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.home / "runs" / self.run_id[:16]

    def peer(self, name: str) -> PeerFolder:
        """Folder of one peer of this run."""
        return PeerFolder(self, name)

    def peers(self) -> list[PeerFolder]:
        """All peers of this run on this machine."""
        if not self.path.is_dir():
            return []
        return [self.peer(entry.name) for entry in sorted(self.path.iterdir()) if (entry / "daemon.lock").exists()]

    def save(self, manifest: RunManifest, signature: bytes, tokenizer: bytes | None, draft_digest: str = "") -> None:
        """Keep a sealed manifest; each file appears whole, the manifest last. Raises StateError."""
        try:
            with _file_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                write_whole(self.path / "tokenizer.json", tokenizer)
            write_whole(self.path / "manifest.sig", signature)
            if draft_digest:
                write_whole(self.path / "draft.digest", draft_digest.encode())
            write_whole(self.path / "manifest.json", manifest.canonical_bytes())
        except StateError:
            self.discard_unsaved()
            raise

    def discard_unsaved(self) -> None:
        """Remove what is here of a run that never got its manifest, as after a join that found nobody."""
        saved = (self.path / "manifest.json").exists()
        if saved or any(peer.running() is not None for peer in self.peers()):
            return
        shutil.rmtree(self.path, ignore_errors=True)

    def load(self) -> tuple[RunManifest, bytes, bytes | None] | None:
        """(manifest, signature, tokenizer.json or None) as saved; None if this run was never saved here.

        Raises ManifestError if the files are damaged, StateError if they cannot be read.
        """
        if not (self.path / "manifest.json").exists():
            return None
        with _file_errors(self.path):
            manifest = RunManifest.from_bytes((self.path / "manifest.json").read_bytes(), self.run_id)
            signature = (self.path / "manifest.sig").read_bytes()
            tokenizer = None
            if manifest.tokenizer.source != "bytes":
                tokenizer = (self.path / "tokenizer.json").read_bytes()
        check_signature(manifest, signature)
        return manifest, signature, tokenizer


@dataclass(frozen=True)
class PeerFolder:
    """The files of one peer."""

    run: RunFolder
    name: str

    @property
    def path(self) -> Path:
        """Folder of the peer."""
        return self.run.path / self.name

    @property
    def key(self) -> Path:
        """The identity, shared by the peers of this name in every run."""
        return key_file(self.run.home, self.name)

    def running(self) -> dict[str, Any] | None:
        """What daemon.json says of a living daemon; None if none lives."""
        try:
            with (self.path / "daemon.lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None  # nobody holds it
        except BlockingIOError:
            pass
        except OSError:
            return None
        try:
            found: dict[str, Any] = json.loads((self.path / "daemon.json").read_bytes())
        except (OSError, ValueError):
            return {}  # it is just starting
        return found

    def lock(self) -> int:
        """Become this peer's daemon; the lock goes with the process. Raises OccupiedError if one lives."""
        with _file_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(handle, 0)
                return handle
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE_S)  # `running`, in another program, holds it for a moment
        os.close(handle)
        raise OccupiedError(
            f"This machine already takes part in run {self.run.run_id[:16]} as '{self.name}'; look with "
            f"`p2pllm status`, or add a second peer with --name."
        )

    def reach(self, knows_others: bool) -> Reach:
        """Who could dial this peer the last time. The first of a run is there to be dialled."""
        if not knows_others and not (self.path / "peers.json").exists():
            return Reach.PUBLIC
        is_public = (self.path / "public").exists()
        return Reach.PUBLIC if is_public else Reach.UNKNOWN

    def remember_reach(self, reach: Reach) -> None:
        """Keep it for the next start."""
        with contextlib.suppress(OSError):  # a full disk; the next start finds it out again
            if reach is Reach.PUBLIC:
                (self.path / "public").touch()
            else:
                (self.path / "public").unlink(missing_ok=True)

    def starting_pid(self) -> int | None:
        """Process id of the daemon that has the lock; None if it is no daemon, or has only just taken it."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.path / "daemon.lock").read_bytes())
        return None


def is_peer_name(name: str) -> bool:
    """Whether a peer may be called so: folders, units of systemd and agents of launchd take the same name."""
    return re.fullmatch(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_-]{1,32}", name) is not None


def key_file(home: Path, name: str) -> Path:
    """Where the identity of the peers called `name` lies."""
    return home / "keys" / f"{name}.key"


def all_runs(home: Path) -> list[RunFolder]:
    """Every run that this machine knows, the one used last first.

    One whose manifest is damaged, or was written by another version, has only the beginning of its id: its daemon
    can still be seen and stopped, and `load` says what is wrong.
    """
    found = []
    for manifest in (home / "runs").glob("*/manifest.json"):
        try:
            run_id = RunManifest.from_bytes(manifest.read_bytes()).run_id
        except (P2PLLMError, OSError):
            run_id = manifest.parent.name
        last_used = max(entry.stat().st_mtime for entry in [manifest.parent, *manifest.parent.glob("*/rounds.jsonl")])
        found.append((last_used, RunFolder(home, run_id)))
    return [run for _, run in sorted(found, key=lambda item: item[0], reverse=True)]


def founded_from(home: Path, draft_digest: str, founder: str) -> RunFolder | None:
    """The run that `founder` started from this very draft before, if any."""
    for run in all_runs(home):
        marker = run.path / "draft.digest"
        if marker.exists() and marker.read_text() == draft_digest:
            loaded = run.load()
            if loaded is not None and loaded[0].founder == founder:
                return run
    return None


def name_to_join_as(run: RunFolder) -> str:
    """The peer name of a `join` that names none: what this machine already is in the run, else a volunteer.

    A machine whose founder is running gets a second peer, so that two terminals make a swarm.
    """
    founder, volunteer = run.peer(FOUNDER), run.peer(VOLUNTEER)
    if volunteer.path.exists() or not founder.path.exists() or founder.running() is not None:
        return VOLUNTEER
    return FOUNDER


def check_signature(manifest: RunManifest, signature: bytes) -> None:
    """Raise ManifestError unless the founder that the manifest names has signed it."""
    if not verify(manifest.founder, SIGNING_DOMAIN, manifest.canonical_bytes(), signature):
        raise ManifestError(
            f"The manifest of run {manifest.run_id[:16]} is not signed by its founder; ask the organiser for a new "
            f"invite."
        )


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that no reader and no crash of ours leaves half of it. Raises StateError.

    Other users of the machine cannot read it: a daemon's holds the invite.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _file_errors(path):
        try:
            temporary.touch(0o600)
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one sentence that names the place."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise NoRoomError(
            f"Cannot use {where}: {error.strerror or error}; free the disk, mend the permissions, or choose "
            f"another folder with --home."
        ) from None
