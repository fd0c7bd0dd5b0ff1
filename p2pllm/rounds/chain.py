"""What makes a log of records right, and which of two logs to follow: pure functions.

A log is right where each record is linked to the one before it, adds up, and is voted for. Of two right logs the
better one holds a newer checkpoint of the organiser; if neither does, it has more samples behind it; the smaller
digest breaks ties. What does not live here: the records (`record`) and fetching them (`catchup`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Body, Checkpoint, Head, Record, genesis, is_vote


class Branch(NamedTuple):
    """A log as a peer announces it: where it has come to, and what decides whether to follow it."""

    head: Head
    total: int  # samples behind it
    anchor: int  # round of the newest checkpoint of the organiser on it; 0: none

    @property
    def rank(self) -> tuple[int, int, int]:
        """The greater one is to be followed."""
        return (self.anchor, self.total, -int.from_bytes(self.head[1], "big"))


def start_of(run_id: str) -> Branch:
    """The branch of a peer that has no record."""
    return Branch(genesis(run_id), 0, 0)


def check_links(records: Sequence[Record], base: Branch, run_id: str) -> None:
    """Raise MessageError unless the records follow each other from `base`, of this run, and their totals add up."""
    head, total, run = base.head, base.total, bytes.fromhex(run_id)
    for record in records:
        body = record.body
        if body.run != run:
            raise MessageError(f"record {body.round} is of another run")
        if body.base != head:
            raise MessageError(f"record {body.round} does not follow record {head[0]}")
        if body.total != total + body.samples:
            raise MessageError(f"record {body.round} does not add up")
        head, total = body.head, body.total


def check_votes(record: Record) -> None:
    """Raise MessageError unless all votes are signed and enough of them are there.

    Enough is more than half of the members, or one member: those who are left of a roster go on, see README.md.
    """
    digest = record.body.digest
    for peer, (_, signature) in zip(record.voters, record.votes, strict=True):
        if not is_vote(peer, digest, signature):
            raise MessageError(f"record {record.body.round} has a vote that {peer[-8:]} did not sign")
    if not set(record.voters) & set(record.body.peers):
        raise MessageError(f"no member of record {record.body.round} voted for it")


def check_claims(body: Body) -> None:
    """Raise MessageError unless every member signed what the body says that it brought."""
    for claim in body.members:
        if not claim.is_signed(body.base):
            raise MessageError(f"record {body.round} has a claim that {claim.peer[-8:]} did not sign")


def newest_checkpoint(checkpoints: Iterable[Checkpoint], founder: str, run_id: str) -> Checkpoint | None:
    """The one of the latest round that the organiser signed for this run; of two the smaller digest."""
    run = bytes.fromhex(run_id)
    right = [point for point in checkpoints if point.run == run and point.is_signed(founder)]
    return min(right, key=lambda point: (-point.round, point.record), default=None)
