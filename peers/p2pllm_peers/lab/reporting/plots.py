"""The charts of a report, for wide and for narrow windows.

What does not live here: numbers (`report`), and what makes a picture fit into a page (`svg`). matplotlib is only
there with the extra `lab`.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from p2pllm_peers.lab.reporting.commits import PARTS
from p2pllm_peers.lab.reporting.costs import KINDS
from p2pllm_peers.lab.reporting.svg import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    GRID,
    INK,
    MUTED,
    NARROW,
    PAPER,
    PINK,
    SKY,
    STYLE,
    VERMILION,
    WIDE,
    inline,
    legend_above,
    new_figure,
)
from p2pllm_peers.lab.reporting.words import count

Report = dict[str, Any]

PART_COLOURS = dict(zip(PARTS, (BLUE, AMBER, VERMILION, PINK, GREEN, SKY, GREY), strict=True))
KIND_COLOURS = dict(zip(KINDS, (AMBER, BLUE, GREEN), strict=True))
STATE_COLOURS = {"up": GREEN, "starting": SKY, "frozen": BLUE, "cut": VERMILION, "paused": AMBER, "down": GRID}

TIME_LABEL = "time since the first peers were ready, s"
MAX_POINTS = 600
"""Of one curve; a page is hardly wider."""
MAX_MARKERS = 120
"""Of one curve; more would hide it."""
MAX_BARS = 240
"""Of one chart; beyond, rounds that follow each other share one."""
MAX_ROWS = 24
"""Peers in one chart; tables show all."""
MAX_NUMBERED = 16
"""Faults that are numbered; more would cover each other."""


@dataclass(frozen=True)
class Chart:
    """One chart for wide and for narrow windows. name: of the HTML element. says: what it shows, for who cannot see."""

    name: str
    title: str
    says: str
    wide: str
    narrow: str


def charts(report: Report) -> list[Chart]:
    """All charts that the run gives something to draw for, in the order of the page."""
    drawn = []
    if report["rounds"]:
        drawn += [
            _chart(report, "loss-time", "Loss against time", _loss_by_time),
            _chart(report, "loss-tokens", "Loss against tokens", _loss_by_tokens),
            _chart(report, "speed", "Tokens a second", _speed),
        ]
    if any(report["timeline"].values()):
        drawn.append(_chart(report, "timeline", "Peers and what befell them", _timeline))
    if any(row["own"] or row["wire"]["up"] for row in report["peers"]):
        drawn.append(_chart(report, "bytes", "Bytes of each peer", _bytes))
    if report["parts"]:
        drawn += [
            _chart(report, "parts-peers", "Where a round's time goes, by peer", _parts_by_peer),
            _chart(report, "parts-rounds", "Where a round's time goes, by round", _parts_by_round),
        ]
    return drawn


def _chart(report: Report, name: str, title: str, draw: Callable[[Report, float], tuple[Figure, str]]) -> Chart:
    with mpl.rc_context(STYLE):
        pictures = [draw(report, width) for width in (WIDE, NARROW)]
        wide, narrow = (inline(figure, f"{name}-{number}") for number, (figure, _) in enumerate(pictures))
    return Chart(name, title, pictures[0][1], wide, narrow)


def _thin(rows: Sequence[Any]) -> list[Any]:
    """Every n-th row and the last, so that a long run does not make a heavy page."""
    step = -(-len(rows) // MAX_POINTS)
    return [row for place, row in enumerate(rows) if place % step == 0 or place == len(rows) - 1]


def _loss_by_time(report: Report, width: float) -> tuple[Figure, str]:
    figure, axes = new_figure(width, 300)
    says = _losses(report, axes, "time_s", 1.0)
    axes.set_xlabel(TIME_LABEL)
    legend_above(figure, axes.lines, width)
    return figure, says + _mark_faults(report, axes)


def _loss_by_tokens(report: Report, width: float) -> tuple[Figure, str]:
    figure, axes = new_figure(width, 300)
    most = report["swarm"]["tokens"]
    scale, unit = (1e9, "thousand million") if most >= 1e10 else (1e6, "million") if most >= 1e7 else (1e3, "thousand")
    says = _losses(report, axes, "tokens_so_far", scale)
    axes.set_xlabel(f"tokens that the swarm trained on, {unit}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    legend_above(figure, axes.lines, width)
    return figure, says


def _losses(report: Report, axes: Axes, key: str, scale: float) -> str:
    told = []
    for name, label, colour in (("loss", "training", BLUE), ("validation_loss", "validation", VERMILION)):
        rows = _thin([row for row in report["rounds"] if row[name] is not None])
        if rows:
            marker = "o" if name == "validation_loss" and len(rows) <= MAX_MARKERS else ""
            axes.plot([row[key] / scale for row in rows], [row[name] for row in rows], label=label, color=colour,
                      marker=marker, markersize=3.5, linewidth=1.4)  # fmt: skip
            told.append(f"{label} loss from {rows[0][name]:.3f} to {rows[-1][name]:.3f} nats a token")
    axes.set_ylabel("loss, nats a token")
    return "; ".join(told)


def _speed(report: Report, width: float) -> tuple[Figure, str]:
    """Tokens of the rounds committed within the last seconds, so that a swarm that stalls is seen to."""
    figure, axes = new_figure(width, 300)
    rounds, end_s, alone = report["rounds"], report["run"]["ended_s"], report["swarm"]["alone_tokens_per_s"]
    window = max(5.0, 4 * (report["swarm"]["round_interval_s"] or 0.0))
    first = min(rounds[0]["time_s"] + window, rounds[-1]["time_s"])
    times = [first + (end_s - first) * step / 400 for step in range(401)] if end_s > first else [first]
    rates = _rates(rounds, times, window)
    axes.plot(times, rates, color=BLUE)
    axes.set_xlabel(TIME_LABEL)
    axes.set_ylabel(f"tokens/s, mean of {window:.0f} s")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 1.2 * max([*rates, alone or 0.0, 1.0]))
    if alone:
        axes.axhline(alone, color=VERMILION, linestyle=(0, (5, 3)), linewidth=1.4)
        label = f"the peers alone, added up: {alone:,.0f}"
        axes.annotate(label, (0.01, alone), (0, 4), xycoords=("axes fraction", "data"), textcoords="offset points")
    marked = _mark_faults(report, axes)
    return figure, f"the swarm's tokens a second, mean of the last {window:.0f} s, {max(rates):,.0f} at most{marked}"


def _rates(rounds: Sequence[dict[str, Any]], times: Sequence[float], window: float) -> list[float]:
    """Tokens a second of the rounds that were committed in the `window` seconds until each of the times."""
    committed = sorted((row["time_s"], row["tokens"]) for row in rounds)
    at = [time_s for time_s, _ in committed]
    so_far = [0, *itertools.accumulate(tokens for _, tokens in committed)]
    return [(so_far[bisect_right(at, time_s)] - so_far[bisect_right(at, time_s - window)]) / window for time_s in times]


def _mark_faults(report: Report, axes: Axes) -> str:
    """Time from 0 to the end, a line where each fault struck, its number in the table, a shade until it was undone."""
    rows = report["recoveries"]
    axes.set_xlim(min(0.0, axes.dataLim.x0), report["run"]["ended_s"])
    for number, row in enumerate(rows, 1):
        axes.axvline(row["at_s"], color=MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=0.6)
        if row["undone_s"] is not None:
            axes.axvspan(row["at_s"], row["undone_s"], color=MUTED, alpha=0.13, linewidth=0, zorder=0.1)
        if len(rows) <= MAX_NUMBERED:
            axes.annotate(
                str(number), (row["at_s"], 1), (3, -2), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="top", fontsize=12, fontweight="bold",
            )  # fmt: skip
    numbered = ", numbered as in the table below" if len(rows) <= MAX_NUMBERED else ""
    return f"; dotted lines: faults{numbered}; shaded: until they were undone" if rows else ""


def _shown(report: Report) -> tuple[list[str], str]:
    """Names of the peers that fit into a chart, the first at the top, and what to say of the others."""
    names = [row["name"] for row in report["peers"]]
    return names[:MAX_ROWS], f"; the first {MAX_ROWS} of {len(names)} peers" if len(names) > MAX_ROWS else ""


def _rows_of_peers(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _timeline(report: Report, width: float) -> tuple[Figure, str]:
    names, more = _shown(report)
    figure, axes = new_figure(width, 120 + 30 * len(names))
    for place, name in enumerate(names):
        for state in report["timeline"][name]:
            axes.barh(
                place, state["to_s"] - state["from_s"], left=state["from_s"], height=0.62,
                color=STATE_COLOURS[state["state"]], edgecolor=PAPER, linewidth=0.8, zorder=2,
            )  # fmt: skip
    backs = [
        (row["undone_s"] + row["return_s"], names.index(victim))
        for row in report["recoveries"]
        for victim in row["victims"]
        if row["away"] and row["return_s"] is not None and victim in names and len(row["victims"]) == 1
    ]
    if backs:
        times, places = zip(*backs, strict=True)
        axes.scatter(times, places, marker="^", s=46, color=INK, edgecolor=PAPER, linewidth=0.8, zorder=3)
    _rows_of_peers(axes, names)
    axes.set_ylim(len(names) - 0.5, -1.1)
    axes.set_xlabel(TIME_LABEL)
    marked = _mark_faults(report, axes)
    used = {state["state"] for name in names for state in report["timeline"][name]}
    handles: list[Any] = [Patch(color=STATE_COLOURS[state], label=state) for state in STATE_COLOURS if state in used]
    if backs:
        handles += axes.plot([], [], "^", color=INK, label="commits again")
    legend_above(figure, handles, width)
    return figure, f"when each peer was up, and {count(len(report['recoveries']), 'fault')}{marked}{more}"


def _bytes(report: Report, width: float) -> tuple[Figure, str]:
    shown, more = _shown(report)
    rows = [row for row in report["peers"] if row["name"] in shown]
    figure, axes = new_figure(width, 120 + 44 * len(rows))
    most = max([1, *(value or 0 for row in rows for value in (*row["wire"].values(), *row["payload"].values()))])
    scale, unit = (1e9, "GB") if most >= 1e9 else (1e6, "MB") if most >= 1e6 else (1e3, "kB")
    for place, row in enumerate(rows):
        for offset, way, wire in ((-0.2, "sent", "up"), (0.2, "received", "down")):
            left = 0.0
            for kind in KINDS:
                value = row["own"].get(f"{kind}_{way}", 0) / scale
                axes.barh(place + offset, value, left=left, height=0.34, color=KIND_COLOURS[kind])
                left += value
            on_wire = (row["wire"][wire] or 0) / scale
            if row["wire"][wire] is not None:
                axes.plot([on_wire, on_wire], [place + offset - 0.19, place + offset + 0.19], color=INK, linewidth=2.2)
            label = "up" if way == "sent" else "down"
            axes.annotate(label, (max(left, on_wire), place + offset), (5, 0), textcoords="offset points",
                          va="center", fontsize=12)  # fmt: skip
    _rows_of_peers(axes, [row["name"] for row in rows])
    axes.margins(x=0.1)
    axes.set_xlabel(f"bytes, {unit}")
    names = {"control": "control calls", "updates": "updates", "state": "states"}
    handles: list[Any] = [Patch(color=KIND_COLOURS[kind], label=names[kind]) for kind in KINDS]
    if measured := any(row["wire"]["up"] is not None for row in rows):
        handles += axes.plot([], [], "|", color=INK, markersize=12, markeredgewidth=2.2, label="on the wire")
    legend_above(figure, handles, width)
    marks = "marks: on the wire, with all headers" if measured else "bytes on the wire were not measured"
    return figure, f"bars: payload as each peer counts it, up and down; {marks}{more}"


def _parts_by_peer(report: Report, width: float) -> tuple[Figure, str]:
    found = report["anatomy"]["peers"]
    shown, more = _shown(report)
    names = [name for name in shown if found.get(name)]
    figure, axes = new_figure(width, 120 + 30 * len(names))
    left = [0.0] * len(names)
    for part in PARTS:
        values = [found[name].get(part, {"mean": 0.0})["mean"] for name in names]
        axes.barh(range(len(names)), values, left=left, height=0.62, color=PART_COLOURS[part], edgecolor=PAPER,
                  linewidth=0.6)  # fmt: skip
        left = [before + value for before, value in zip(left, values, strict=True)]
    _rows_of_peers(axes, names)
    axes.set_xlabel("mean seconds of a round")
    legend_above(figure, [Patch(color=PART_COLOURS[part], label=part) for part in PARTS], width)
    told = ", ".join(f"{part} {row['mean']:.3f} s" for part, row in report["anatomy"]["swarm"].items())
    return figure, f"mean over all peers and rounds: {told}{more}"


def _parts_by_round(report: Report, width: float) -> tuple[Figure, str]:
    figure, axes = new_figure(width, 320)
    rounds = sorted({row["round"] for row in report["parts"]})
    step = -(-len(rounds) // MAX_BARS)
    numbers = rounds[::step]
    stacks = [[0.0] * len(numbers) for _ in PARTS]
    places = {number: place // step for place, number in enumerate(rounds)}
    counts = Counter(places[row["round"]] for row in report["parts"])
    for row in report["parts"]:
        place = places[row["round"]]
        for stack, part in zip(stacks, PARTS, strict=True):
            stack[place] += (row[part] or 0.0) / counts[place]
    axes.stackplot(numbers, stacks, colors=[PART_COLOURS[part] for part in PARTS], linewidth=0, step="mid")
    axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    axes.set_xlabel("round" if step == 1 else f"round, {step} together")
    axes.set_ylabel("seconds, mean of its peers")
    legend_above(figure, [Patch(color=PART_COLOURS[part], label=part) for part in PARTS], width)
    return figure, f"the same parts for each of {len(rounds)} rounds"
