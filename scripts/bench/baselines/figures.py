"""Figures of one system from what its peers recorded: pure functions.

A round is an update of the shared model. Rates are taken from the first round's end to the last one's, so neither the
start nor the round that the end cuts off counts. What does not live here: making the records, and the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from baselines.messages import Row

Wire = Sequence[tuple[float, int]]
"""(unix time, bytes that all peers have sent so far), in order; empty where the wire is not counted."""


@dataclass(frozen=True)
class Round:
    """One update as the whole group made it. Losses in nats a token."""

    number: int
    unix_time: float  # when the first peer had it
    tokens: int
    loss: float
    validation_loss: float | None = None


@dataclass(frozen=True)
class Figures:
    """What is compared. None: could not be measured, or was not reached."""

    rounds: int
    tokens_per_s: float | None
    bytes_per_token: float | None
    seconds_to_loss: float | None
    best_loss: float | None


def rounds_of(rows: Mapping[str, Sequence[Row]]) -> list[Round]:
    """The group's rounds from its peers' rows; a validation loss is the mean over the peers that measured it."""
    by_number: dict[int, list[Row]] = {}
    for row in (row for peer in rows.values() for row in peer):
        by_number.setdefault(row.round, []).append(row)
    found = []
    for number, same in sorted(by_number.items()):
        tokens = sum(row.tokens for row in same)
        losses = [row.validation_loss for row in same if row.validation_loss is not None]
        loss = sum(row.loss * row.tokens for row in same) / max(1, tokens)
        when = min(row.unix_time for row in same)
        found.append(Round(number, when, tokens, loss, fmean(losses) if losses else None))
    return found


def figures(rounds: Sequence[Round], began: float, wire: Wire, target_loss: float) -> Figures:
    """Everything that is compared. began: unix time at which all were ready."""
    losses = [(each.unix_time - began, each.validation_loss) for each in rounds if each.validation_loss is not None]
    tokens = sum(each.tokens for each in rounds[1:])
    seconds = rounds[-1].unix_time - rounds[0].unix_time if rounds else 0.0
    moved = _bytes_at(wire, rounds[-1].unix_time) - _bytes_at(wire, rounds[0].unix_time) if rounds and wire else None
    return Figures(
        rounds=len(rounds),
        tokens_per_s=tokens / seconds if seconds > 0 else None,
        bytes_per_token=moved / tokens if moved is not None and tokens else None,
        seconds_to_loss=seconds_to(losses, target_loss),
        best_loss=min((loss for _, loss in losses), default=None),
    )


def seconds_to(losses: Sequence[tuple[float, float]], target: float) -> float | None:
    """When the line through (seconds, loss) first falls to the target; None if it does not."""
    before: tuple[float, float] | None = None
    for when, loss in losses:
        if loss <= target:
            if before is None:
                return when
            return when - (when - before[0]) * (target - loss) / (before[1] - loss)
        before = when, loss
    return None


def _bytes_at(wire: Wire, when: float) -> float:
    """The counter at a moment, on the line between the samples around it."""
    before = wire[0]
    for after in wire:
        if after[0] >= when:
            width = after[0] - before[0]
            share = (when - before[0]) / width if width > 0 else 1.0
            return before[1] + (after[1] - before[1]) * min(1.0, max(0.0, share))
        before = after
    return float(wire[-1][1])
