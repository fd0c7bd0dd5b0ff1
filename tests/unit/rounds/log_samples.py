"""Logs to test with: records whose signatures are none, what a log shows, and the frames of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pllm.identity import Identity
from p2pllm.rounds.chain import Branch, start_of
from p2pllm.rounds.log import MAGIC, RoundLog
from p2pllm.rounds.record import Body, Checkpoint, Claim, Head, Record

RUN, OTHER_RUN = "5a" * 32, "5b" * 32
FOUNDER = Identity(Ed25519PrivateKey.from_private_bytes(bytes(32)))
START = start_of(RUN)


def after(base: Branch, salt: int = 0, run: str = RUN) -> Record:
    """A record that follows `base`. It holds what looks like the start of a frame; its signatures are none."""
    claim = Claim(key=bytes(32), samples=1 + salt, loss=1.0, update=MAGIC * 8, signature=bytes(64))
    body = Body(
        run=bytes.fromhex(run),
        round=base.head[0] + 1,
        previous=base.head[1],
        total=base.total + claim.samples,
        members=(claim,),
        aggregate=MAGIC + b"\x01" + bytes(27),
        state=bytes([salt]) * 32,
    )
    return Record(body=body, votes=((bytes(32), bytes(64)),))


def grown(base: Branch, salts: list[int], run: str = RUN) -> list[Record]:
    """Records that follow `base`, one for each salt."""
    records = list[Record]()
    for salt in salts:
        records.append(after(base, salt, run))
        base = Branch(records[-1].head, records[-1].body.total, 0)
    return records


def opened(path: Path | None, read_only: bool = False) -> RoundLog:
    return RoundLog(path, RUN, FOUNDER.peer_id, read_only)


def filled(path: Path | None, salts: list[int]) -> RoundLog:
    log = opened(path)
    for record in grown(START, salts):
        log.append(record)
    return log


def checkpoint(head: Head) -> Checkpoint:
    return Checkpoint.sign(FOUNDER, RUN, head)


def seen(log: RoundLog) -> dict[str, Any]:
    """All that a log shows."""
    records = list(log.records())
    rounds = range(log.branch.head[0] + 2)
    assert records == [log.record(round_) for round_ in rounds[1:-1]]
    return {
        "branch": log.branch,
        "records": records,
        "digests": [log.digest(round_) for round_ in rounds],
        "missing": log.missing(),
        "abandoned": log.abandoned(),
        "checkpoint": log.checkpoint,
        "sample": log.sample(),
    }


def last_record(log: RoundLog) -> None:
    log.append(after(log.branch, 5))


def last_switch(log: RoundLog) -> None:
    log.switch(log.sample()[1], grown(Branch(log.sample()[1], log.branch.total - 4, 0), []))


def last_checkpoint(log: RoundLog) -> None:
    assert log.add_checkpoint(checkpoint(log.branch.head))


class Frame(NamedTuple):
    """A frame as the test reads it from an undamaged file."""

    start: int
    end: int
    kind: int
    payload: bytes


def frames_of(data: bytes, at: int = 0) -> list[Frame]:
    frames = list[Frame]()
    while at < len(data):
        assert data[at : at + 4] == MAGIC
        size = int.from_bytes(data[at + 5 : at + 9], "big")
        frames.append(Frame(at, at + 25 + size, data[at + 4], data[at + 9 : at + 9 + size]))
        at = frames[-1].end
    return frames
