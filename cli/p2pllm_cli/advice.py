"""Advice: what the user of a peer should know at the moment, and what would help, from the peer's status alone.

What does not live here: showing it (`view`), and judging a machine before it takes part (`doctor`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LITTLE_DISK = 1e9
"""Free bytes below which a disk is nearly full."""

SLOW_S = 1.0
"""A shorter exchange says nothing about a line, however short a round is."""

_SLOWING = ("cpu_percent", "duty_percent", "hours", "only_on_mains", "only_when_idle")
_NARROWING = ("upload_mbit", "download_mbit")

Advice = tuple[str, str]
"""A sentence of one or two lines, and its style in rich's words."""


def advice(status: dict[str, Any]) -> Iterator[Advice]:
    """What matters most comes first. A daemon of another version may not tell everything."""
    if status.get("trouble"):
        yield f"takes no part: {status['trouble']}", "red"
    if status.get("paused"):
        yield f"paused: {status['paused']}", "yellow"
    elif not status["peers"]:
        yield "nobody else is here yet: hand out the invite of `p2pllm status`", "yellow"
    free = status.get("disk_free")
    if free is not None and free < LITTLE_DISK:
        yield f"the disk has {free / 1e6:,.0f} MB left: free some, or `p2pllm clean`", "yellow"
    if status.get("notice"):
        yield status["notice"], "yellow"
    elif times := status.get("worker_restarts"):
        yield (
            f"the compute process died {times} times, and computes {status['micro_batch']} samples at once now: "
            f"see `p2pllm logs`",
            "yellow",
        )
    yield from _line(status)
    limits = status.get("limits", {})
    if slowing := [f"{name}={limits[name]}" for name in _SLOWING if name in limits]:
        yield f"computes less because of {', '.join(slowing)}: see `p2pllm set`", "dim"


def _line(status: dict[str, Any]) -> Iterator[Advice]:
    """Of the way to the others."""
    seconds, limits = status.get("seconds", {}), status.get("limits", {})
    exchange, compute = seconds.get("exchange", 0.0), seconds.get("compute", 0.0)
    if exchange > max(compute, SLOW_S):
        narrowing = [f"{name}={limits[name]}" for name in _NARROWING if name in limits]
        why = f"because of {', '.join(narrowing)}?" if narrowing else "a line, here or elsewhere, is slow for this run"
        yield f"the exchange took {exchange:.3g} s, computing {compute:.3g} s: {why}", "yellow"
    if status.get("reach") == "relay":
        yield "others reach this peer only through a relay: `p2pllm doctor` says what helps", "yellow"
