"""Credit: who contributed what to a run, counted from the signed claims in its log, by anyone and at any time.

What does not live here: rechecking the log itself (`audit`), and showing any of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from p2pllm.errors import StateError
from p2pllm.rounds.audit import FORGED, Step
from p2pllm.rounds.chain import check_claims
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Body, Head

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


class Count:
    """The claims of a log summed by peer, as far as they were counted. Not for several threads at once."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.head: Head = (0, b"")
        self._credits: dict[str, Credit] = {}
        self.samples = self._missing = 0

    def go_on(self, log: RoundLog, *, check: bool = False) -> Iterator[int]:
        """Count on from `head`, or anew if the log's branch became another one; the number of each counted round.

        check: verify the signature of each claim. Raises StateError for one that its peer did not sign.
        """
        if self.head[0] and not log.has(self.head):
            self._begin()
        first = self.head[0] + 1
        for round_, record in enumerate(log.records(first), first):
            if record is None:
                self._missing += 1
            else:
                self._add(round_, record.body, check)
            self.head = (round_, log.digest(round_) or b"")
            yield round_

    def _add(self, round_: int, body: Body, check: bool) -> None:
        try:
            if check:
                check_claims(body)
        except MessageError as error:
            raise StateError(f"The log is not right: {error}; {FORGED}.") from None
        self.samples += body.samples
        for claim in body.members:
            credit = self._credits.setdefault(claim.peer, Credit())
            credit.samples += claim.samples
            credit.rounds += 1
            credit.last = round_

    def of(self, peer: str) -> Credit:
        """What one peer contributed."""
        return self._credits.get(peer, Credit())

    def tally(self) -> Tally:
        """All that was counted."""
        ranked = sorted(self._credits.items(), key=lambda item: (-item[1].samples, item[0]))
        return Tally(dict(ranked), self.samples, self.head[0] - self._missing, self._missing)


def tally(log: RoundLog, *, check: bool = True) -> Generator[Step, None, Tally]:
    """Sum the claims of a log by peer. check: verify the signature of each, which takes most of the time.

    Raises StateError for a claim that its peer did not sign.
    """
    count, last = Count(), log.branch.head[0]
    for round_ in count.go_on(log, check=check):
        yield Step("claims", round_, last)
    return count.tally()


class Ledger:
    """What one peer contributed to a run, kept up to date as its log grows."""

    def __init__(self, log: RoundLog, peer: str) -> None:
        self._log: RoundLog | None = log
        self._peer = peer
        self._count = Count()
        self._complete = False

    @property
    def samples(self) -> int:
        """Of the peer, as far as they were counted."""
        return self._count.of(self._peer).samples

    @property
    def of_all(self) -> int:
        """Samples of all peers, as far as they were counted."""
        return self._count.samples

    def update(self) -> bool:
        """Count what is new, at most COUNTED_AT_ONCE rounds; whether that was all."""
        if self._log is not None:
            for _ in islice(self._count.go_on(self._log), COUNTED_AT_ONCE):
                pass
            self._complete = self._count.head[0] == self._log.branch.head[0]
        return self._complete

    def close(self) -> None:
        """Count no more: the log is about to be closed."""
        self._log = None
