"""report.html: a report as one file that needs no network, no server and no program but a browser.

What lives here: which numbers and tables the page shows, in words and units. What does not: the numbers (`report`),
the charts (`plots`), and what it looks like (`page.html.j2`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pllm.errors import UsageError
from p2pllm_peers.lab.reporting.costs import KINDS
from p2pllm_peers.lab.reporting.words import (
    amount,
    branch_in_words,
    compact,
    count,
    duration,
    in_words,
    median,
    share,
    size,
    source,
)

Report = dict[str, Any]
MAX_EVENTS = 400
"""Rows of a table; the report itself has all of them."""


@dataclass(frozen=True)
class Table:
    """Plain text in rows. words: how many of the columns, from the left, are text and not numbers."""

    name: str
    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def write_page(report: Report, path: Path) -> None:
    """Write the page of a report. Raises UsageError if the extra `lab` is not installed or the file cannot be made."""
    try:
        import jinja2

        from p2pllm_peers.lab.reporting.plots import charts
    except ModuleNotFoundError as missing:
        if missing.name not in ("jinja2", "matplotlib"):
            raise
        raise UsageError(
            "The report's page needs matplotlib and jinja2, which are not installed: pip install -e '.[lab]'."
        ) from None
    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(
        run=report["run"],
        checks=report["checks"],
        failed=[check for check in report["checks"] if not check["passed"]],
        numbers=headline(report),
        charts=charts(report),
        tables=[table for table in tables(report) if table.rows],
        notes=report["notes"],
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}; name another folder.") from None


def headline(report: Report) -> list[tuple[str, str, str]]:
    """The numbers that matter most: (what, value with unit, what it means)."""
    swarm, run = report["swarm"], report["run"]
    spent = swarm["bytes"]
    rows = [
        ("rounds", f"{swarm['rounds']:,}", f"one in {amount(swarm['round_interval_s'], 's')}, median"),
        ("training loss", amount(swarm["final_loss"], ""), "nats a token, last round"),
        ("validation loss", amount(swarm["final_validation_loss"], ""), "nats a token, newest"),
        ("speed", amount(swarm["tokens_per_s"], "tokens/s"), "of the swarm, without its first rounds"),
        ("efficiency", share(swarm["efficiency"]), swarm["why_no_efficiency"] or "of what the peers make alone"),
        ("tokens", f"{swarm['tokens']:,}", f"{swarm['samples']:,} samples"),
        ("bytes a token", size(spent["per_token"]), f"sent by all peers, {source(swarm)}"),
        ("bytes a round", size(spent["per_round"]), f"{size(spent['total'])} in all"),
        ("time", duration(run["ended_s"]), f"on {count(run['cpus'], 'core')} of one machine"),
    ]
    if report["recoveries"]:
        after = median(report["recoveries"], "survivors_s")
        rows.append(("recovery", amount(after, "s"), "next commit of the others, median"))
    return rows


def tables(report: Report) -> list[Table]:
    """All tables of the page, also empty ones."""
    return [_recoveries(report), _branches(report), _reached(report), *_peers(report), _links(report), _events(report)]


def _recoveries(report: Report) -> Table:
    rows = []
    for number, row in enumerate(report["recoveries"], 1):
        what = in_words(report["events"][row["event"]])
        seen = "–"
        if row["phase"]:
            seen = f"{row['victims'][0]}, after round {row['round']}, {1000 * row['age_s']:.0f} ms before"
        numbers = (row["at_s"], row["undone_s"], row["survivors_s"], row["delay_s"], row["stall_s"], row["return_s"])
        rows.append(
            [str(number), what, seen, *(amount(value, "s") for value in numbers), _or_dash(row["return_round"])]
        )
    head = ("number", "fault", "who was last seen in that phase", "struck at", "undone at", "others' next commit after",
            "beyond a round", "stalled for", "back after", "back in round")  # fmt: skip
    calm = amount(report["swarm"]["calm_round_s"], "s")
    note = (
        f"Numbers are those in the charts. A round: the median of those that no fault touched, {calm}. Stalled: what "
        "that round or the next took them more than usual, without computing. Back: from the "
        "end of the fault (where the peer was never away: from its beginning) to the first commit of a round of which "
        "the last one it had struck is a member; “–” if that never came."
    )
    return Table("recoveries", "Faults and recoveries", note, head, rows, words=3)


def _branches(report: Report) -> Table:
    rows = []
    for row in report["branches"]:
        cause = "nothing known" if row["cause"] is None else in_words(report["events"][row["cause"]])
        span = f"{row['from_s']:.0f} - {row['to_s']:.0f} s"
        back = amount(row["rejoined_s"], "s")
        rows.append([branch_in_words(row), cause, span, f"{row['tokens']:,}", back])
    head = ("what", "cause", "committed at", "tokens", "all back at")
    note = "Rounds that peers committed and the swarm did not keep."
    return Table("branches", "Forks and divergences", note, head, rows, words=2)


def _reached(report: Report) -> Table:
    rows = report["reached"]
    step = -(-len(rows) // 12)
    picked = rows[:: max(1, step)]
    picked += [] if not rows or rows[-1] in picked else [rows[-1]]
    told = [
        [f"{row['validation_loss']:.1f}", str(row["round"]), amount(row["time_s"], "s"), f"{row['tokens']:,}"]
        for row in picked
    ]
    head = ("validation loss, nats a token", "round", "time", "tokens")
    return Table("reached", "Time to a validation loss", "", head, told)


def _peers(report: Report) -> list[Table]:
    ends = {row["name"]: row for row in report["at_end"]}
    work, traffic = [], []
    for row in report["peers"]:
        end = ends[row["name"]]
        cores = f"{row['cores']:g}" if row["cores"] else "no limit"
        work.append(
            [row["name"], end["state"], row["link"] or "loopback", cores, f"{row['rounds']:,}", f"{row['samples']:,}",
             amount(row["alone_tokens_per_s"], "tokens/s"), amount(row["cpu_s"], "s"), _or_dash(end["behind"])]
        )  # fmt: skip
        own = [size(row["own"].get(f"{kind}_{way}")) for way in ("sent", "received") for kind in KINDS]
        wire = [size(row["wire"][way]) for way in ("up", "down")]
        cost = [size(row["bytes_per_round"]["up"]), size(row["bytes_per_token"]["up"])]
        traffic.append([row["name"], wire[0], *own[:3], wire[1], *own[3:], *cost])
    return [
        Table(
            "peers", "Peers", "", ("peer", "at the end", "link", "cores", "rounds", "samples", "speed alone",
                                   "CPU time", "rounds behind"), work, words=3
        ),
        Table(
            "traffic", "Bytes of each peer, in numbers",
            "On the wire: counters of the interface, with all headers. Control, updates, states: payload, as the peer "
            f"counts it. A round that it committed, a token that it gave: {source(report['swarm'])}.",
            ("peer", "up on the wire", "control up", "updates up", "states up", "down on the wire", "control down",
             "updates down", "states down", "up, a round", "up, a token"), traffic,
        ),
    ]  # fmt: skip


def _links(report: Report) -> Table:
    rows = []
    for row in report["links"]:
        judged = {None: "not judged", True: "within", False: "OUTSIDE"}[row["passed"]]
        tolerance = "–" if row["tolerance"] is None else f"± {compact(row['tolerance'])} {row['unit']}"
        values = [f"{compact(row[key])} {row['unit']}" for key in ("asked", "measured")]
        rows.append([row["peer"], row["what"], judged, *values, tolerance])
    head = ("peer", "what", "tolerance held", "asked", "measured", "tolerance")
    return Table("links", "Lines: asked for and measured", "", head, rows, words=3)


def _events(report: Report) -> Table:
    struck = {row["event"]: row for row in report["struck"]}
    rows = []
    for number, event in enumerate(report["events"][:MAX_EVENTS]):
        done = struck.get(number)
        result = "not reached" if done is None else done["error"] or "carried out"
        rows.append([in_words(event), result, amount(event["at_s"], "s"), amount(done and done["at_s"], "s")])
    more = len(report["events"]) - MAX_EVENTS
    note = f"The first {MAX_EVENTS}; {more} more are in the report." if more > 0 else ""
    return Table("events", "Events", note, ("event", "result", "planned at", "struck at"), rows, words=2)


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)
