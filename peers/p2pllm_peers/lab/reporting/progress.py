"""How far and how fast a swarm came: its rounds, the losses that it reached, and its speed against lone peers.

What does not live here: which rounds are the swarm's (`history`), bytes and CPU (`costs`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from p2pllm_peers.lab.evidence import Facts
from p2pllm_peers.lab.reporting.commits import Commit
from p2pllm_peers.lab.reporting.history import History

WARM_UP_ROUNDS = 3
"""Rounds that the steady span leaves out at first, if there are more than twice as many."""

Row = dict[str, Any]


def rounds_of(commits: Mapping[str, list[Commit]], history: History, names: Mapping[str, str]) -> list[Row]:
    """The swarm's rounds that somebody recorded, rising; each counts once, however many peers recorded it."""
    by_round: dict[int, list[Commit]] = {}
    for row in commits.values():
        for commit in row:
            by_round.setdefault(commit.round, []).append(commit)
    rows, so_far = [], 0
    for number in sorted(by_round):
        kept = [commit for commit in by_round[number] if history.main.get(number) == commit.record_digest]
        if kept:
            rows.append(_round(by_round[number], kept, names))
            rows[-1]["tokens_so_far"] = so_far = so_far + rows[-1]["tokens"]
    return rows


def _round(everyone: list[Commit], kept: list[Commit], names: Mapping[str, str]) -> Row:
    first = min(kept, key=lambda commit: commit.time_s)
    evaluated = [commit.validation_loss for commit in kept if commit.validation_loss is not None]
    return {
        "round": first.round,
        "time_s": first.time_s,
        "loss": first.loss,
        "validation_loss": statistics.median(evaluated) if evaluated else None,
        "samples": first.samples,
        "tokens": first.tokens,
        "tokens_so_far": 0,
        "members": [names.get(member, member) for member in first.members],
        "attempts": max(commit.attempts for commit in kept),
        "digests": {commit.peer: commit.record_digest for commit in sorted(everyone, key=lambda commit: commit.time_s)},
    }


def reached(rounds: Sequence[Row]) -> list[Row]:
    """When the validation loss first was at or below each tenth of a nat, falling from where it began."""
    found: list[Row] = []
    at = None
    for row in rounds:
        loss = row["validation_loss"]
        if loss is None:
            continue
        new = math.ceil(round(loss * 10, 6))  # in tenths, so that all runs have the same marks
        for tenths in range(new if at is None else at - 1, new - 1, -1):
            found.append(
                {"validation_loss": tenths / 10, "round": row["round"]}
                | {"time_s": row["time_s"], "tokens": row["tokens_so_far"]}
            )
        at = new if at is None else min(at, new)
    return found


def speed(rounds: Sequence[Row], facts: Facts) -> Row:
    """Tokens a second of the steady span, and its share of what the peers make alone.

    What was committed before the clock began does not count: not all peers were there, and none had its limits.
    """
    timed = [row for row in rounds if row["time_s"] >= 0]
    steady = _steady(timed)
    rate = steady["tokens"] / (steady["to_s"] - steady["from_s"]) if steady else None
    alone = [peer.alone_tokens_per_s for peer in facts.peers]
    known = [value for value in alone if value]
    total = sum(known) if known and len(known) == len(alone) else None
    why = ""
    if total is None:
        why = "the scenario has no alone_s" if not facts.scenario.alone_s else "not every peer was measured alone"
    elif rate is None:
        why = "fewer than two rounds were committed on the clock"
    gaps = [after["time_s"] - before["time_s"] for before, after in itertools.pairwise(timed)]
    return {
        "round_interval_s": statistics.median(gaps) if gaps else None,
        "steady": steady,
        "tokens_per_s": rate,
        "alone_tokens_per_s": total,
        "efficiency": rate / total if rate is not None and total else None,
        "why_no_efficiency": why,
    }


def pace(rounds: Sequence[Row], calm: Sequence[float]) -> Row:
    """Rounds by those of a run without faults that lasts as long; None if unknown.

    calm: seconds of the rounds that no fault touched; their mean counts, since a slow one is slow without faults, too.
    """
    timed = [row["time_s"] for row in rounds if row["time_s"] >= 0]
    lasted = timed[-1] - timed[0] if timed else 0.0
    share = statistics.fmean(calm) * (len(timed) - 1) / lasted if calm and lasted > 0 else None
    return {"calm_round_s": statistics.median(calm) if calm else None, "pace": share}


def _steady(rounds: Sequence[Row]) -> Row | None:
    """From the commit of one round to the last; None without two rounds that lie apart."""
    skipped = WARM_UP_ROUNDS if len(rounds) > 2 * WARM_UP_ROUNDS else 1
    if len(rounds) < 2 or rounds[-1]["time_s"] <= rounds[skipped - 1]["time_s"]:
        return None
    return {
        "from_s": rounds[skipped - 1]["time_s"],
        "to_s": rounds[-1]["time_s"],
        "tokens": sum(row["tokens"] for row in rounds[skipped:]),
    }
