"""Views of the log: tables in a terminal, one record a line where the output is not one, JSON where it is asked for.

What does not live here: reading the log (`log`), and the views of a daemon's status (`view`).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from p2pllm.rounds.audit import Report, Step
from p2pllm_cli.log import Row
from p2pllm_cli.view import console, size

T = TypeVar("T")


class Column(NamedTuple):
    """One fact of a row: its name and its text. plain: the text outside tables, where it is another."""

    heading: str
    text: Callable[[Row], str]
    plain: Callable[[Row], str] | None = None
    left: bool = False  # text, not a number
    in_table: bool = True  # there is room for it in 80 columns


def show(rows: Sequence[Row], columns: Sequence[Column], summary: Row, below: Sequence[str], *, as_json: bool) -> None:
    """Rows with what is to be said below them. In JSON the summary says that: the last line, under "summary"."""
    if as_json:
        for row in [*rows, {"summary": summary}]:
            click.echo(json.dumps(row))
        return
    if console.is_terminal:
        if rows:
            console.print(table(rows, columns))
    else:
        for row in rows:
            click.echo(line(row, columns))
    for text in below:
        say(text)


def say(text: str) -> None:
    """A sentence, folded at spaces in a terminal and nowhere else."""
    console.print(text, highlight=False, soft_wrap=not console.is_terminal)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Rows as a table."""
    columns = [column for column in columns if column.in_table]
    shown = Table(box=None, pad_edge=False)
    for column in columns:
        shown.add_column(column.heading, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(column.text(row) for column in columns))
    return shown


def line(row: Row, columns: Sequence[Column]) -> str:
    """A row as one line of names and values."""
    return " ".join(f"{column.heading} {(column.plain or column.text)(row)}" for column in columns)


def follow(steps: Generator[Step, None, T], *, shown: bool = True) -> T:
    """Run `steps` to the end and return what they return; in a terminal, if `shown`, with a bar meanwhile."""
    words = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*words, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("", total=None)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                found: T = end.value
                return found
            progress.update(task, description=step.what, completed=step.done, total=step.of)


PEER = Column(
    "peer",
    lambda row: row["peer"][-8:] + (" (this)" if row["own"] else ""),
    lambda row: row["peer"] + (" (this)" if row["own"] else ""),
    left=True,
)


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


# -- what the commands show --------------------------------------------------------------------------------------------


def show_rounds(rows: Sequence[Row], summary: Row, *, as_json: bool) -> None:
    """`p2pllm rounds`."""
    below = [f"rounds committed: {summary['rounds']:,}, abandoned: {summary['abandoned']:,}; {_standing(summary)}"]
    if any(row.get("by_minority") for row in rows):
        below.insert(0, "* committed by those who were left: no more than half of the roster voted")
    if summary["missing"]:
        below.append(f"rounds damaged here: {summary['missing']:,}; start the peer, which gets them from the others")
    columns = (
        Column("round", lambda row: str(row["round"])),
        Column("members", _members, lambda row: _members(row).rstrip()),
        Column("samples", lambda row: _or_dash(row.get("samples"), ",")),
        Column("loss", lambda row: _or_dash(row.get("loss"), ".4f")),
        Column("bytes", lambda row: "-" if row["bytes"] is None else size(row["bytes"])),
        Column("time", lambda row: _or_dash(row["round_s"], ",.1f", " s")),
        Column("at", lambda row: _at(row, "%m-%d %H:%M"), lambda row: _at(row, "%Y-%m-%dT%H:%M:%S%z"), left=True),
        Column("record", lambda row: "-" if row["record"] is None else row["record"][:16], in_table=False),
    )
    show(rows, columns, summary, below, as_json=as_json)


def _members(row: Row) -> str:
    """Their number, with a star after it if no more than half of them voted."""
    if row["record"] is None:
        return "damaged"
    return f"{len(row['members'])}{'*' if row['by_minority'] else ' '}"


def _at(row: Row, form: str) -> str:
    when = row["unix_time"]
    return "-" if when is None else datetime.datetime.fromtimestamp(when).astimezone().strftime(form)


def _standing(summary: Row) -> str:
    point = summary["checkpoint"]
    return "no checkpoint" if point is None else f"checkpoint: round {point['round']:,}, {_place(point)}"


def _place(point: Row) -> str:
    words = {True: "on this branch", False: "on another branch", None: "beyond this log"}
    return words[point["on_branch"]]


def show_credits(rows: Sequence[Row], summary: Row, *, as_json: bool) -> None:
    """`p2pllm credits`."""
    below = [f"samples: {summary['samples']:,}, peers: {summary['peers']:,}, rounds: {summary['rounds']:,}"]
    if summary["missing"]:
        below.append(f"rounds damaged here, counted for nobody: {summary['missing']:,}")
    columns = (
        PEER,
        Column("samples", lambda row: f"{row['samples']:,}"),
        Column("share", lambda row: f"{row['share']:.1%}"),
        Column("rounds", lambda row: f"{row['rounds']:,}"),
        Column("last", lambda row: str(row["last_round"])),
    )
    show(rows, columns, summary, below, as_json=as_json)


def show_peers(rows: Sequence[Row], summary: Row, *, as_json: bool) -> None:
    """`p2pllm peers`."""
    live = [
        Column("phase", lambda row: row["phase"] or "-", left=True),
        Column("round", lambda row: _or_dash(row["round"], "d")),
        Column("tokens/s", lambda row: _or_dash(row["tokens_per_s"], ",.0f")),
    ]
    past = [
        Column("rounds", lambda row: f"{row['rounds']:,}"),
        Column("samples", lambda row: f"{row['samples']:,}"),
        Column("last", lambda row: str(row["last_round"] or "-")),
    ]
    addresses = Column("addresses", lambda row: str(row["addresses"]))
    columns, below = [PEER, *past, addresses], "no daemon answers here, so nobody knows who is alive"
    if summary["running"]:
        columns, below = [PEER, *live, *past], f"peers alive: {summary['alive']:,} of {summary['peers']:,}"
    show(rows, columns, summary, [below], as_json=as_json)


def show_checkpoints(rows: Sequence[Row], *, as_json: bool) -> None:
    """`p2pllm checkpoint show`."""
    columns = (
        Column("round", lambda row: str(row["round"])),
        Column("record", lambda row: row["record"][:16], lambda row: row["record"], left=True),
        Column("where", _place, left=True),
    )
    below = [] if rows else ["the organiser has signed no checkpoint that is known here"]
    show(rows, columns, {"checkpoints": len(rows)}, below, as_json=as_json)


def show_report(folder: Path, run_id: str, report: Report, *, as_json: bool) -> None:
    """`p2pllm verify`, of one peer."""
    if as_json:
        values = {**dataclasses.asdict(report), "head": {"round": report.head[0], "record": report.head[1].hex()}}
        click.echo(json.dumps({"folder": str(folder), "run_id": run_id, **values}))
        return
    say(f"{folder}: run {run_id[:16]} up to round {report.head[0]:,} is all right")
    checked = [
        f"links, totals and digests: {report.records:,} records, {report.samples:,} samples",
        f"signatures: {report.claims:,} claims, {report.votes:,} votes, {report.checkpoints:,} checkpoints",
        f"digests: {report.snapshots:,} snapshots, {report.aggregates:,} aggregates",
    ]
    if report.first_state is not None:
        start = f"the snapshot of round {report.first_state:,}"
        checked.append(f"states: {report.replayed:,} computed anew from {start} on, as their records name them")
    for text in checked:
        say(f"checked {text}")
    if report.by_minority:
        say(f"note records for which no more than half of the roster voted: {report.by_minority:,}")
    for text in report.unchecked:
        say(f"not checked {text}")
