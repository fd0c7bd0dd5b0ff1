"""A line as it was asked for and as it was measured, and whether that is the same.

What does not live here: measuring it (`network.checking`).
"""

from __future__ import annotations

from typing import Any

from p2pllm_peers.lab.evidence import LinkCheck

RATE_TOLERANCE = 0.05
"""Share by which a line's rates, and delays that are long, may differ from what was asked for."""
DELAY_TOLERANCE_MS = 2.0

Row = dict[str, Any]


def link_rows(link: LinkCheck) -> list[Row]:
    """Each of a line's properties, and whether it is what was asked for; a loss is too rare to be judged."""
    delay_tolerance = max(DELAY_TOLERANCE_MS, RATE_TOLERANCE * link.asked_delay_ms)
    rows = [
        ("up", "Mbit/s", link.asked_up_mbit, link.measured_up_mbit, RATE_TOLERANCE * link.asked_up_mbit),
        ("down", "Mbit/s", link.asked_down_mbit, link.measured_down_mbit, RATE_TOLERANCE * link.asked_down_mbit),
        ("delay one way", "ms", link.asked_delay_ms, link.measured_delay_ms, delay_tolerance),
        ("loss there and back", "%", 100 * link.asked_loss, 100 * link.measured_loss, None),
    ]
    return [
        {
            "peer": link.peer,
            "what": what,
            "unit": unit,
            "asked": asked,
            "measured": measured,
            "tolerance": tolerance,
            "passed": None if tolerance is None else abs(measured - asked) <= tolerance * (1 + 1e-9),
        }
        for what, unit, asked, measured, tolerance in rows
        if tolerance is not None or asked or measured
    ]


def link_is_right(link: LinkCheck) -> bool:
    """Whether all that is judged of a line is within its tolerance."""
    return all(row["passed"] is not False for row in link_rows(link))
