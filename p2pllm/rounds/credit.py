"""Credit: who contributed what to a run, counted from the signed claims in its log, by anyone and at any time.

What does not live here: rechecking the log itself (`audit`), and showing any of it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from p2pllm.errors import StateError
from p2pllm.rounds.audit import FORGED, Step
from p2pllm.rounds.chain import check_claims
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Head

COUNTED_AT_ONCE = 500
"""Rounds that a ledger counts in a call, so that whoever asks waits some milliseconds."""


@dataclass
class Credit:
    """What one peer contributed."""

    samples: int = 0
    rounds: int = 0
    last: int = 0  # the newest round that it took part in


class Tally(NamedTuple):
    """Who contributed what, the greatest first; missing: rounds that are damaged here, and counted for nobody."""

    credits: dict[str, Credit]
    samples: int
    rounds: int
    missing: int


def tally(log: RoundLog, *, check: bool = True) -> Generator[Step, None, Tally]:
    """Sum the claims of a log by peer. check: verify the signature of each, which takes most of the time.

    Raises StateError for a claim that its peer did not sign.
    """
    credits_, samples, missing = dict[str, Credit](), 0, 0
    head = log.branch.head[0]
    for round_, record in enumerate(log.records(), 1):
        yield Step("claims", round_, head)
        if record is None:
            missing += 1
            continue
        try:
            if check:
                check_claims(record.body)
        except MessageError as error:
            raise StateError(f"The log is not right: {error}; {FORGED}.") from None
        samples += record.body.samples
        for claim in record.body.members:
            credit = credits_.setdefault(claim.peer, Credit())
            credit.samples += claim.samples
            credit.rounds += 1
            credit.last = round_
    ranked = sorted(credits_.items(), key=lambda item: (-item[1].samples, item[0]))
    return Tally(dict(ranked), samples, head - missing, missing)


class Ledger:
    """What one peer contributed to a run, kept up to date as its log grows."""

    def __init__(self, log: RoundLog, peer: str) -> None:
        self._log: RoundLog | None = log
        self._peer = peer
        self._complete = False
        self._counted: Head = (0, b"")
        self.samples = 0
        self.of_all = 0

    def update(self) -> bool:
        """Count what is new, at most COUNTED_AT_ONCE rounds; whether that was all."""
        if self._log is None:
            return self._complete
        round_, digest = self._counted
        if round_ and self._log.digest(round_) != digest:  # the swarm's branch became another one
            self._counted, self.samples, self.of_all = (0, b""), 0, 0
        head = self._log.branch.head[0]
        last = min(head, self._counted[0] + COUNTED_AT_ONCE)
        for round_ in range(self._counted[0] + 1, last + 1):
            record = self._log.record(round_)
            if record is not None:  # else it is damaged here
                self.of_all += record.body.samples
                self.samples += sum(claim.samples for claim in record.body.members if claim.peer == self._peer)
            self._counted = (round_, self._log.digest(round_) or b"")
        self._complete = last == head
        return self._complete

    def close(self) -> None:
        """Count no more: the log is about to be closed."""
        self._log = None
