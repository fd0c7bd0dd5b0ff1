"""Numbers and happenings of a report in plain words, with units.

What does not live here: what is said where (`page`, `report.summary_lines`, `verdict`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any


def in_words(event: dict[str, Any]) -> str:
    """A planned event in a few words."""
    other = event["args"].get("other")
    who = " | ".join(", ".join(group) for group in event["args"].get("groups", [])) or event["peer"]
    phase = f"in {event['phase']}" if event["phase"] else ""
    parts = (event["do"].replace("_", " "), who, f"from {other}" if other else "", phase)
    return " ".join(part for part in parts if part)


def fault_in_words(recovery: dict[str, Any]) -> str:
    """A fault that struck, with whom and when."""
    who = "" if recovery["do"] == "partition" else f" {' and '.join(recovery['victims'])}"
    phase = f" in {recovery['phase']}" if recovery["phase"] else ""
    return f"{recovery['do'].replace('_', ' ')}{who}{phase} at {recovery['at_s']:.0f} s"


def branch_in_words(branch: dict[str, Any]) -> str:
    """A fork or a divergence with its rounds, its peers and how it ended."""
    end = "repaired" if branch["repaired"] else "not repaired"
    end += "" if branch["cause"] is None else ", while cut off"
    return f"{branch['kind']} of {', '.join(branch['peers'])} at {spans(branch['rounds'])} ({end})"


def spans(rounds: list[int]) -> str:
    """Rounds as "round 4" or "rounds 4-7, 9"."""
    groups: list[list[int]] = []
    for number in rounds:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    told = ", ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
    return f"{'round' if len(rounds) == 1 else 'rounds'} {told}"


def count(number: int, what: str) -> str:
    """ "1 round", "2 rounds"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """ "42 s", "5 min 3 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def amount(value: float | None, unit: str) -> str:
    """A value with its unit: losses (no unit) to 4 places, seconds to 1, anything else to none; "–" for None."""
    if value is None:
        return "–"
    places = {"": 4, "s": 1}.get(unit, 0)
    return f"{value:,.{places}f} {unit}".strip()


def compact(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def share(value: float | None) -> str:
    """Percent; "–" for None."""
    return "–" if value is None else f"{value:.1%}"


def size(value: float | None) -> str:
    """Bytes in steps of a thousand, three digits that matter; "–" for None."""
    if value is None:
        return "–"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)):
        if value >= 0.9995 * step:  # what three digits would round up to a thousand is one of the next unit
            return f"{value / step:.3g} {unit}" if value < 999.5 * step else f"{value / step:,.0f} {unit}"
    return f"{value:.3g} B"


def source(swarm: dict[str, Any]) -> str:
    """Who counted a swarm's bytes."""
    return {"wire": "on the wire", "own": "payload", None: "not measured"}[swarm["bytes"]["source"]]


def median(rows: Iterable[dict[str, Any]], key: str) -> float | None:
    """Median of the rows that have the value; None if none has."""
    known = [row[key] for row in rows if row[key] is not None]
    return statistics.median(known) if known else None
