"""How each kind of claim is undone, and how one sees that it is still there.

Processes are known by their id and their birth, so that another one of the same id is never taken for them. What does
not live here: the ledger (`claims`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from p2pllm_peers.lab.cleanup.commands import run

PATIENCE_S = 5.0
"""How long a killed process, a cgroup or a mount may take to go."""

_POLL_S = 0.01
_NAMESPACES = Path("/run/netns")


Kind = Literal["process", "namespace", "cgroup", "mount", "folder"]


@dataclass(frozen=True)
class Claim:
    """Something that a lab made. what: id, name, path or, of a mount, source. birth: of a process."""

    kind: Kind
    what: str
    birth: str = ""


def birth(pid: int) -> str:
    """When a process was started, as the system tells it; "" if there is none of that id, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (ProcessLookupError, FileNotFoundError):
        if Path("/proc/self").exists():
            return ""
    with contextlib.suppress(psutil.Error):  # a system without /proc
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    return ""


def alive(pid: int, born: str) -> bool:
    """The very process that was born then still runs."""
    return born != "" and birth(pid) == born


def still_there(claim: Claim) -> list[str]:
    """What exists of a claim, a short phrase each: the thing itself, and processes in it."""
    lines = [f"process {pid} in {claim.kind} {claim.what}" for pid in _processes([claim]) if claim.kind != "process"]
    if _exists(claim):
        lines.append(f"{claim.kind} {claim.what}")
    return lines


def undo(claims: Sequence[Claim]) -> list[str]:
    """End all processes, then remove everything else, newest first; returns what could not be, as sentences."""
    failed = [f"Process {pid} of the lab does not end." for pid in _end_processes(claims)]
    remove = {"namespace": _remove_namespace, "cgroup": _remove_cgroup, "mount": _unmount, "folder": _remove_folder}
    for claim in reversed(claims):
        if claim.kind == "process" or not _exists(claim):
            continue
        try:
            remove[claim.kind](claim.what)
        except OSError as error:
            failed.append(f"The lab's {claim.kind} {claim.what} could not be removed: {error.strerror or error}.")
    return failed


def _exists(claim: Claim) -> bool:
    match claim.kind:
        case "process":
            return alive(int(claim.what), claim.birth)
        case "namespace":
            return (_NAMESPACES / claim.what).exists()
        case "mount":
            return bool(_mount_points(claim.what))
        case _:
            return Path(claim.what).exists()


def _processes(claims: Sequence[Claim]) -> set[int]:
    """The claimed processes, and all that are in claimed namespaces and cgroups. Never our own."""
    found = {int(claim.what) for claim in claims if claim.kind == "process" and _exists(claim)}
    for claim in claims:
        if claim.kind == "cgroup":
            for members in Path(claim.what).rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    found.update(map(int, members.read_text().split()))
    namespaces = set()
    for claim in claims:
        if claim.kind == "namespace":
            with contextlib.suppress(OSError):
                status = (_NAMESPACES / claim.what).stat()
                namespaces.add((status.st_dev, status.st_ino))
    if namespaces:
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = (entry / "ns" / "net").stat()
                if (status.st_dev, status.st_ino) in namespaces:
                    found.add(int(entry.name))
    return {pid for pid in found - {os.getpid()} if birth(pid)}


def _end_processes(claims: Sequence[Claim]) -> set[int]:
    """Kill until there are none, because they may start others meanwhile; returns those that do not end."""
    end = time.monotonic() + PATIENCE_S
    while (left := _processes(claims)) and time.monotonic() < end:
        _kill(left)
        time.sleep(_POLL_S)
    return left


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _remove_namespace(name: str) -> None:
    result = run(["ip", "netns", "delete", name])
    if result.returncode and (_NAMESPACES / name).exists():
        raise OSError(0, result.stderr.strip())


def _remove_cgroup(path: str) -> None:
    """Deepest first. The kernel refuses for a moment after the last process has gone."""
    for folder in sorted([Path(path), *(entry for entry in Path(path).rglob("*") if entry.is_dir())], reverse=True):
        _patiently(partial(_remove_empty_cgroup, folder))


def _remove_empty_cgroup(folder: Path) -> None:
    """A process that its lab had just started may come in only now."""
    _kill(_processes([Claim("cgroup", str(folder))]))
    folder.rmdir()


def _unmount(source: str) -> None:
    """Wherever it is by now. Who still holds a file there keeps it, but nobody else sees the mount any more."""

    def once(*how: str) -> None:
        said = [run(["umount", *how, point]).stderr.strip() for point in _mount_points(source)]
        if _mount_points(source):
            raise OSError(0, said[-1] if said else "it has only just appeared")

    try:
        _patiently(once)
    except OSError:
        once("--lazy")


def _remove_folder(path: str) -> None:
    """With all that is in it, but never through a mount that could not be undone."""
    if inside := [point for _, point in _mounts() if Path(point).is_relative_to(path)]:
        raise OSError(0, f"{inside[0]} is still mounted")

    def once() -> None:
        with contextlib.suppress(FileNotFoundError):  # a daemon that leaves removes its sockets meanwhile
            shutil.rmtree(path)
        if Path(path).exists():
            raise OSError(0, "somebody still writes into it")

    _patiently(once)


def _mount_points(source: str) -> list[str]:
    return [point for name, point in _mounts() if name == source]


def _mounts() -> list[tuple[str, str]]:
    """(source, path) of everything that is mounted, the newest last. The kernel keeps the paths true."""
    try:
        lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")
    except FileNotFoundError:
        return []
    rows = (line.partition(" - ") for line in lines if line)
    return [(_unescaped(right.split(" ")[1]), _unescaped(left.split(" ")[4])) for left, _, right in rows]


def _unescaped(text: str) -> str:
    """A space is \\040 there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _patiently(action: Callable[[], None]) -> None:
    """Repeat an action that fails with OSError for a while."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            action()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(_POLL_S)
