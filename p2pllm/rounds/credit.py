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
