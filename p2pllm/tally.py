"""What a peer shows to those who watch it from outside: its daemon's status, and what its records come to.

What does not live here: reading files and asking daemons (`p2pllm_peers.exporter`), and names (`metric_names`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from p2pllm.metrics import RoundRecord

Status = dict[str, Any]
"""What a daemon answers to "status"."""


@dataclass
class Tally:
    """What the records of one peer come to, over all rounds that it recorded."""

    newest: RoundRecord | None = None  # with the newest validation loss there is
    rounds: int = 0
    own_samples: int = 0
    tokens: int = 0
    failed_attempts: int = 0
    round_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # a part of the rounds -> its time

    def add(self, record: RoundRecord) -> None:
        """Count a further round."""
        if record.validation_loss is None and self.newest is not None:
            self.newest = replace(record, validation_loss=self.newest.validation_loss)
        else:
            self.newest = record
        self.rounds += 1
        self.own_samples += sum(record.own_steps)
        self.tokens += record.tokens
        self.failed_attempts += max(0, record.attempts - 1)
        self.round_s += record.round_s
        for part, seconds in record.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds


@dataclass(frozen=True)
class Reading:
    """What one peer shows at one moment. status: None if its daemon does not run, or does not answer."""

    run: str
    peer: str
    status: Status | None
    tally: Tally
