"""What peers recorded, checked and on one clock: the base of everything that a report says.

What lives here: reading rows of `p2pllm.metrics.RoundRecord`, and the heads at which a peer was seen. What does not:
which of them became the swarm's history (`history`), and files (`evidence`).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from p2pllm_peers.lab.evidence import Sample

Node = tuple[int, str]
"""(round, digest of its record, in hex), which names the state after it, too."""

PARTS = ("compute", "roster", "exchange", "vote", "apply", "validation", "idle")
"""Where the time of a round goes, in order; "apply" is the outer step and its digest, "idle" what no part explains."""

STALE_S = 5.0
"""A sample shows what a peer said a moment ago: so long after a record, one that knows less is old."""


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Loss = Annotated[float | None, BeforeValidator(_finite_or_none)]


class Commit(BaseModel):
    """One round as one peer recorded it. time_s is on the lab's clock; a loss that was not finite is None."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    peer: str
    time_s: float
    round: int = Field(ge=1)
    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    members: dict[str, int]
    loss: Loss
    validation_loss: Loss = None
    attempts: int = 1
    record_digest: str
    seconds: dict[str, float] = {}
    traffic: dict[str, int] = {}
    round_s: float | None = None

    @property
    def node(self) -> Node:
        """The place in the log that it led to."""
        return (self.round, self.record_digest)

    @property
    def began_s(self) -> float:
        """When the peer began to work on the round."""
        return self.time_s - (self.round_s or sum(self.seconds.values()))

    @property
    def overhead_s(self) -> float:
        """What the round took beside computing and evaluating."""
        row = self.parts()
        return sum(row[part] or 0.0 for part in ("roster", "exchange", "vote", "apply"))

    def parts(self) -> dict[str, float | None]:
        """Seconds of each of PARTS; idle is None in records that do not tell how long the whole round took."""
        known = self.seconds
        row: dict[str, float | None] = {part: known.get(part, 0.0) for part in PARTS}
        row["apply"] = known.get("outer_step", 0.0) + known.get("digest", 0.0)
        row["idle"] = max(0.0, self.round_s - sum(known.values())) if self.round_s else None
        return row


def read_commits(peer: str, rows: list[dict[str, Any]], began_unix: float) -> tuple[list[Commit], int]:
    """One peer's commits by time, and how many rows were whole lines but no records: a damaged file.

    Torn lines, which every kill may leave, are not among the rows.
    """
    commits = []
    for row in rows:
        try:
            commits.append(Commit.model_validate({**row, "peer": peer, "time_s": row["unix_time"] - began_unix}))
        except (ValidationError, TypeError, KeyError):
            continue
    return sorted(commits, key=lambda commit: commit.time_s), len(rows) - len(commits)


class Sight(BaseModel):
    """A peer was at `node` at time_s."""

    model_config = ConfigDict(frozen=True)

    time_s: float
    node: Node
    commit: Commit | None = None  # the record that says so; else a sample does


def sights(peer: str, commits: list[Commit], samples: list[Sample], end_s: float) -> list[Sight]:
    """Everything that is known of where a peer was until `end_s`, by time."""
    seen = [Sight(time_s=commit.time_s, node=commit.node, commit=commit) for commit in commits]
    for sample in samples:
        at = sample.peers.get(peer)
        if at is not None and at.phase and at.digest and at.round > 0:
            seen.append(Sight(time_s=sample.t, node=(at.round, at.digest)))
    kept: list[Sight] = []
    last: Commit | None = None
    for sight in sorted(seen, key=lambda sight: sight.time_s):
        last = sight.commit or last
        stale = last and sight.node[0] < last.round and sight.time_s < last.time_s + STALE_S
        if sight.time_s <= end_s and not (stale and sight.commit is None):
            kept.append(sight)
    return kept
