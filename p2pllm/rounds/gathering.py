"""What a peer knows of a round that is being closed, and how far it has come in finding who closes it.

What does not live here: asking, answering and closing (`roster`), and the order of leaders (`plan`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pllm.rounds.messages import Enrol, Roster
from p2pllm.rounds.record import Claim, Head

LEADER_GRACE_S = 3.0
"""How much longer than the roster wait a member waits for a leader that acknowledged."""


@dataclass(frozen=True)
class Offer:
    """What we bring to a round."""

    claim: Claim
    former: frozenset[str] = frozenset()  # members of the newest record
    holding: bytes = b""  # digest of the body that we voted for in an attempt without majority; empty: none
    proof: bytes = b""  # that we hold it, see `sign_holding`
    failed: frozenset[bytes] = frozenset()  # proposals that we would not settle again


@dataclass
class Gathering:
    """What is known of the round that is being closed."""

    head: Head
    enrolments: dict[str, Enrol] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)  # leaders that hold our enrolment
    closed: tuple[Roster, str] | None = None  # and who sent it


@dataclass
class Search:
    """How far one call of `gather` has come in finding a leader."""

    started: float
    passed_over: dict[str, float]  # peer -> until when it does not lead
    left_out: frozenset[str]
    suspects: frozenset[str]  # that the last attempt failed by
    waived: set[str] = field(default_factory=set)  # had their time as leaders, so they are not waited for
    leader: str = ""
    asked_since: float = 0.0
    leading_since: float | None = None

    def patience(self, wait: float) -> float:
        """Seconds that we as the leader wait for who is not in, where the manifest states `wait`.

        If another one led before us, others may still wait for it, each at most the grace longer.
        """
        return wait + LEADER_GRACE_S if self.passed_over or self.leader else wait
