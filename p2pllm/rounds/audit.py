"""Audit: what a peer's files prove to whoever reads them, checked again from the first byte; nothing is changed.

`audit` is a generator: it yields how far it is, and returns what was right. What does not live here: the rules that a
log must keep (`chain`), the manifest's own signature, which the caller has checked, and showing any of it.
"""

from __future__ import annotations

import mmap
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from p2pllm.errors import StateError
from p2pllm.manifest import RunManifest
from p2pllm.rounds.chain import Branch, check_claims, check_links, check_votes, newest_checkpoint, start_of
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.log import MAGIC, RoundLog
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import MAX_RECORD_BYTES, Checkpoint, Head
from p2pllm.state import OuterOptimizer, SharedState, Snapshot, outer_optimizer

FORGED = "do not trust these files, and join the run anew under another name"
"""What to do about what no accident makes."""

_HEADER, _CHECK = 9, 16  # bytes of a frame of the log before and after its payload, see `log`


class Step(NamedTuple):
    """How far it is: `done` of `of` pieces of `what`."""

    what: str
    done: int
    of: int


@dataclass
class Report:
    """What was found right, in numbers; `unchecked` says in sentences what these files cannot show."""

    head: Head
    samples: int = 0
    records: int = 0
    by_minority: int = 0  # records for which no more than half of the roster voted
    claims: int = 0
    votes: int = 0
    checkpoints: int = 0
    snapshots: int = 0
    aggregates: int = 0
    replayed: int = 0  # rounds whose state was computed anew
    first_state: int | None = None  # round of the oldest snapshot, from which they were
    unchecked: list[str] = field(default_factory=list)


def audit(folder: Path, manifest: RunManifest) -> Generator[Step, None, Report]:
    """Recheck all files of a peer, or of a copy of them; its daemon may be running.

    Raises StateError for the first thing that is wrong; it names the file and the round.
    """
    disk = Disk(folder, manifest, None, read_only=True)
    try:
        path = folder / "log"
        report = Report(disk.log.branch.head)
        yield from _check_records(disk, path, report)
        _check_bytes(path, manifest, report)
        _check_checkpoints(disk.log, path, manifest, report)
        bases = _named_snapshots(disk, folder / "state", report)
        used = yield from _replay(disk, manifest, bases, folder / "aggregates", report)
        yield from _check_aggregates(disk, folder / "aggregates", used, report)
    finally:
        disk.close()
    if report.records:
        report.unchecked.append("that an aggregate is the mean of the members' updates, which nobody keeps")
    return report


# -- the log -----------------------------------------------------------------------------------------------------------


def _check_records(disk: Disk, path: Path, report: Report) -> Generator[Step, None, None]:
    """Every record: its links, totals and signatures."""
    base = start_of(disk.run_id)
    for round_, record in enumerate(disk.log.records(), 1):
        if record is None:
            raise StateError(
                f"Record {round_} in {path} is damaged or missing; start the peer, which gets it from the others."
            )
        try:
            check_links([record], base, disk.run_id)
            check_votes(record)
            check_claims(record.body)
        except MessageError as error:
            raise StateError(f"The log {path} is not right: {error}; {FORGED}.") from None
        base = Branch(record.head, record.body.total, 0)
        report.samples = record.body.total
        report.records += 1
        report.by_minority += not record.has_majority
        report.claims += len(record.body.members)
        report.votes += len(record.votes)
        yield Step("records", round_, report.head[0])


def _check_bytes(path: Path, manifest: RunManifest, report: Report) -> None:
    """What a RoundLog passes over in silence: bytes that are no frame, and checkpoints that do not count."""
    if not path.exists() or not path.stat().st_size:
        return
    end = damaged = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for at, payload in _frames(data):
            damaged += at - end
            end = at + _HEADER + len(payload) + _CHECK
            _check_if_checkpoint(payload, path, manifest)
        torn = len(data) - end
    if torn:
        raise StateError(
            f"The log {path} ends in {torn} bytes that are no whole record, behind round {report.head[0]}; start the "
            f"peer, which cuts them off and gets what is lost from the others."
        )
    if damaged:
        report.unchecked.append(f"damaged bytes of the log, which lost no record: {damaged}")


def _frames(data: mmap.mmap) -> Iterator[tuple[int, bytes]]:
    """(at, payload) of every undamaged frame."""
    at = data.find(MAGIC)
    while at >= 0:
        size = int.from_bytes(data[at + 5 : at + _HEADER], "big")
        end = at + _HEADER + size
        if size <= MAX_RECORD_BYTES and blake3(data[at + len(MAGIC) : end]).digest(_CHECK) == data[end : end + _CHECK]:
            yield at, data[at + _HEADER : end]
            at = data.find(MAGIC, end + _CHECK)
        else:
            at = data.find(MAGIC, at + 1)


def _check_if_checkpoint(payload: bytes, path: Path, manifest: RunManifest) -> None:
    try:
        point = Checkpoint.unpack(payload)
    except MessageError:
        return  # another kind of frame
    if point.run != bytes.fromhex(manifest.run_id) or not point.is_signed(manifest.founder):
        raise StateError(
            f"The checkpoint of round {point.round} in {path} is not signed by the run's organiser; {FORGED}."
        )


def _check_checkpoints(log: RoundLog, path: Path, manifest: RunManifest, report: Report) -> None:
    """The newest one that we have come to decides which branch is the run's."""
    points, head = log.checkpoints, report.head[0]
    newest = newest_checkpoint([point for point in points if point.round <= head], manifest.founder, manifest.run_id)
    if newest is not None and not log.has(newest.head):
        raise StateError(
            f"The organiser's checkpoint of round {newest.round} names another record than {path} has there, so these "
            f"files are not on the run's branch; start the peer, which moves to it."
        )
    report.checkpoints = len(points)
    if beyond := sum(point.round > head for point in points):
        report.unchecked.append(f"checkpoints of rounds beyond {head}, where these files end: {beyond}")
    if left := len(log.abandoned()):
        report.unchecked.append(f"rounds of branches that were left: {left}")


# -- states ------------------------------------------------------------------------------------------------------------


def _named_snapshots(disk: Disk, folder: Path, report: Report) -> list[Snapshot]:
    """The snapshots of our branch, oldest first; each says that it is the state that its record names."""
    found, branch, elsewhere = disk.snapshots.all(), list[Snapshot](), 0
    whole, abandoned = {each.name for each in found}, set(disk.log.abandoned())
    for path in sorted(folder.glob("[!.]*.safetensors")):
        if path.name not in whole and path.exists():  # else a daemon dropped it meanwhile
            raise StateError(f"The saved state {path} is damaged or of another run; remove it.")
    for each in reversed(found):
        if each.round > report.head[0] or (each.round, each.record) in abandoned:
            elsewhere += 1
        elif disk.log.digest(each.round) == each.record and _named_state(disk, each.round) == each.state:
            branch.append(each)
        else:
            raise StateError(
                f"The saved state {folder / each.name} is not the one that round {each.round} led to; remove it."
            )
    if elsewhere:
        report.unchecked.append(f"saved states of branches that were left, or beyond this log: {elsewhere}")
    return branch


def _named_state(disk: Disk, round_: int) -> bytes:
    record = disk.log.record(round_)
    return disk.initial_state if record is None else record.body.state


def _replay(
    disk: Disk, manifest: RunManifest, bases: list[Snapshot], folder: Path, report: Report
) -> Generator[Step, None, set[bytes]]:
    """Compute every state anew that the snapshots and aggregates lead to; returns the aggregates that were used."""
    used, state, head = set[bytes](), None, report.head[0]
    listed = disk.snapshots.all()
    for base in bases:
        yield Step("rounds to replay", base.round, head)
        try:
            if state is not None and state.round >= base.round:
                disk.snapshots.plan(base)  # replaying came through it, so only its file is left to check
                report.snapshots += 1
                continue
            loaded = disk.snapshots.load(base)
        except StateError:
            if base in disk.snapshots.all():
                raise
            continue  # the daemon has newer ones by now
        _say_skipped(report, state, base.round)
        state = loaded
        report.snapshots += 1
        for digest in _replayed(disk, state, outer_optimizer(manifest, state.layout), folder):
            used.add(digest)
            report.replayed += 1
            yield Step("rounds to replay", state.round, head)
    if state is None and head:
        report.unchecked.append("any state, since no snapshot is here")
    elif state is not None and state.round < head:
        if disk.snapshots.all()[:1] == listed[:1]:
            raise StateError(
                f"The aggregate of round {state.round + 1} is not in {folder}, so these files lead to round "
                f"{state.round} only, not {head}; start the peer, which gets it from the others."
            )
        report.unchecked.append(f"the states after round {state.round}: the running peer dropped what leads to them")
    return used


def _replayed(disk: Disk, state: SharedState, optimizer: OuterOptimizer, folder: Path) -> Iterator[bytes]:
    """Take `state` along the log, to its head or to where an aggregate is missing; the digest of each one used."""
    for record in disk.log.records(state.round + 1):
        if record is None:
            return  # damaged since we checked it
        digest = record.body.aggregate
        vector = disk.update_of(record.body, state.layout)
        if vector is None:
            _check_absent(disk, digest, folder)
            return
        optimizer.step(state, vector)
        if bytes.fromhex(state.digest()) != record.body.state:
            raise StateError(
                f"Replaying round {state.round} gives another state than its record names; verify on another machine, "
                f"and if it finds the same, {FORGED}."
            )
        yield digest


def _check_absent(disk: Disk, digest: bytes, folder: Path) -> None:
    """A blob that cannot be read may be missing, but not be there."""
    if disk.aggregates.has(digest):
        rounds = [record.body.round for record in disk.log.records() if record and record.body.aggregate == digest]
        of_round = f" of round {rounds[0]}" if rounds else ""
        raise StateError(f"The aggregate {folder / digest.hex()}{of_round} is damaged; remove it.")


def _say_skipped(report: Report, state: SharedState | None, to: int) -> None:
    """That no state was computed from `state` on to the snapshot of round `to`."""
    if state is None:
        report.first_state = to
    if state is None and to > 0:
        report.unchecked.append(
            f"the states before round {to}, of which no snapshot is kept: their records are checked by digests and "
            f"signatures alone"
        )
    elif state is not None:
        report.unchecked.append(f"the states from round {state.round + 1} to {to - 1}: not all aggregates are kept")


def _check_aggregates(disk: Disk, folder: Path, used: set[bytes], report: Report) -> Generator[Step, None, None]:
    """Those that no replay used, and so verified."""
    report.aggregates = len(used)
    others = sorted(disk.aggregates.digests() - used)
    for number, digest in enumerate(others, 1):
        if disk.aggregates.get(digest) is None:
            _check_absent(disk, digest, folder)
        else:
            report.aggregates += 1
        yield Step("aggregates", number, len(others))
