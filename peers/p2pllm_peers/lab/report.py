"""What a swarm did, in numbers, from the records that its peers wrote.

Pure: records in, a report out. All times in seconds, losses in nats a token.
"""

from __future__ import annotations

import statistics
from typing import Any

Records = dict[str, list[dict[str, Any]]]

NETWORK_PARTS = ("roster", "exchange", "vote", "outer_step", "digest")
"""Parts of a round outside compute."""


def summarise(records: Records) -> dict[str, Any]:
    """Loss curve, tokens a second, bytes and digests of every round, and where the time of a round goes."""
    by_round: dict[int, dict[str, dict[str, Any]]] = {}
    for peer, rows in records.items():
        for row in rows:
            by_round.setdefault(row["round"], {})[peer] = row
    rounds = []
    for number, rows_of_round in sorted(by_round.items()):
        first = next(iter(rows_of_round.values()))
        validation = [row["validation_loss"] for row in rows_of_round.values() if row["validation_loss"] is not None]
        rounds.append(
            {
                "round": number,
                "unix_time": min(row["unix_time"] for row in rows_of_round.values()),
                "loss": first["loss"],
                "validation_loss": validation[0] if validation else None,
                "samples": first["samples"],
                "tokens": first["tokens"],
                "members": len(first["members"]),
                "digests": {peer: row["state_digest"] for peer, row in rows_of_round.items()},
                "bytes_sent": {peer: row["bytes_sent"] for peer, row in rows_of_round.items()},
            }
        )
    return {
        "rounds": rounds,
        "rounds_committed": rounds[-1]["round"] if rounds else 0,
        "diverged_rounds": [row["round"] for row in rounds if len(set(row["digests"].values())) > 1],
        "tokens": sum(row["tokens"] for row in rounds),
        "tokens_per_s": _rate(rounds),
        "round_seconds": anatomy(records),
        "overhead_median_s": overhead(records),
    }


def anatomy(records: Records) -> dict[str, dict[str, float]]:
    """Median and largest seconds of each part of a round over all peers and rounds."""
    parts: dict[str, list[float]] = {}
    for rows in records.values():
        for row in rows:
            for part, seconds in row["seconds"].items():
                parts.setdefault(part, []).append(seconds)
    return {part: {"median": statistics.median(values), "max": max(values)} for part, values in parts.items()}


def overhead(records: Records) -> float | None:
    """Median seconds of a round outside compute; None without rounds."""
    sums = [sum(row["seconds"].get(part, 0.0) for part in NETWORK_PARTS) for rows in records.values() for row in rows]
    return statistics.median(sums) if sums else None


def _rate(rounds: list[dict[str, Any]]) -> float | None:
    """Tokens a second between the first and the last commit; None with fewer than two rounds."""
    if len(rounds) < 2:
        return None
    span = rounds[-1]["unix_time"] - rounds[0]["unix_time"]
    return sum(row["tokens"] for row in rounds[1:]) / span if span > 0 else None
