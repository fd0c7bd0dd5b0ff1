"""Rich views of a start and of a daemon's status; plain lines where the output is not a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from itertools import islice
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from p2pllm_cli.advice import advice
from p2pllm_peers.control import watch

console = Console(markup=False)  # what is shown comes from files and from peers
_BARS = "▁▂▃▄▅▆▇█"

SHOWN_S = 0.1
"""Parts of a round that took less are shown without their time."""

MOST_ADVICE = 3
"""Sentences of advice in a panel; the others would take the room of the peers."""

_PARTS = {"collecting": "compute", "roster": "roster", "exchange": "exchange", "vote": "vote", "commit": "apply"}
"""Phases of a round, and what records call the time that they took."""


class StartView:
    """What a daemon does while it starts: a spinner, or a line for each new step."""

    def __init__(self) -> None:
        self._spinner: Status | None = None
        self._last = ""

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._spinner = console.status("starting")
            self._spinner.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._spinner is not None:
            self._spinner.stop()

    def progress(self, text: str) -> None:
        """Show the step that is under way."""
        if self._spinner is not None:
            self._spinner.update(text)
        elif text != self._last:
            console.print(text, highlight=False, soft_wrap=True)
        self._last = text


class LiveView:
    """A daemon's status until it ends: a live panel, or a line a round."""

    def __init__(self, socket: str, bottom: Callable[[], str]) -> None:
        """bottom: what the panel says below, as what Ctrl+C does."""
        self._socket = socket
        self._bottom = bottom

    def show(self) -> None:
        """Return when the daemon has ended."""
        if not console.is_terminal:
            shown = -1
            for status in watch(self._socket):
                if status["recorded_round"] != shown:
                    shown = status["recorded_round"]
                    console.print(status_line(status), highlight=False, soft_wrap=True)
            return
        with Live(console=console, refresh_per_second=4) as live:
            for status in watch(self._socket):
                live.update(panel(status, bottom=self._bottom(), height=console.height))


def status_line(status: dict[str, Any]) -> str:
    """One line for logs and pipes."""
    return (
        f"round {status['recorded_round']}/{status['rounds']} loss {_loss(status['loss'])} "
        f"validation {_loss(status.get('validation_loss'))} peers {1 + len(status['peers'])} "
        f"tokens/s {status['swarm_tokens_per_s']:.0f} "
        f"up {size(status['bytes_sent'])} down {size(status['bytes_received'])}"
        + (f" takes no part: {status['trouble']}" if status.get("trouble") else "")
        + (f" paused: {status['paused']}" if status.get("paused") else "")
        + (f" note: {status['notice']}" if status.get("notice") else "")
    )


def panel(status: dict[str, Any], *, bottom: str = "", height: int = 0) -> Panel:
    """The whole status, at most 78 columns wide. height: of the terminal in lines, 0: any."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("round", f"{status['round']} of {status['rounds']}", "samples", _progress(status))
    facts.add_row("loss", _loss(status["loss"]), "validation", _loss(status.get("validation_loss")))
    facts.add_row(
        "tokens/s",
        f"{status['tokens_per_s']:,.0f} here",
        "",
        f"{status['swarm_tokens_per_s']:,.0f} in the swarm",
    )
    facts.add_row("sent", size(status["bytes_sent"]), "received", size(status["bytes_received"]))
    facts.add_row("device", status["device"], "micro-batch", str(status["micro_batch"]))
    if credit := status.get("credit"):
        facts.add_row("my credit", _credit(credit), "", "samples in committed rounds")
    parts: list[Any] = [facts, _phases(status)]
    if len(status["losses"]) > 1:
        parts.append(Text(f"loss  {curve(status['losses'])}", no_wrap=True, overflow="crop"))
    if status.get("limits"):
        limits = " ".join(f"{name}={value}" for name, value in status["limits"].items())
        parts.append(Text(f"limits  {limits}", no_wrap=True, overflow="ellipsis"))
    for words, style in islice(advice(status), MOST_ADVICE):
        parts += [Text(line, style=style) for line in textwrap.wrap(words, min(78, console.width) - 4)]
    me = {**status, "peer": f"{status['peer_id'][-8:]} (this)"}
    parts.append(peer_table([me, *status["peers"]], most=max(3, height - 12 - len(parts)) if height else 0))
    return Panel(
        Group(*parts),
        title=_title(status),
        subtitle=bottom or None,
        width=min(78, console.width),
    )


def _progress(status: dict[str, Any]) -> str:
    """How far the swarm is with the round under way."""
    wanted, gathered = status.get("wanted", 0), status.get("gathered", 0)
    if not wanted:
        return "-"
    done = min(10, 10 * gathered // wanted)
    return f"{'█' * done}{'░' * (10 - done)} {gathered:,} of {wanted:,}"


def _phases(status: dict[str, Any]) -> Text:
    """The parts of a round in their order, the present one marked, with how long each took the last time."""
    seconds = status.get("seconds", {})
    text = Text("phase", no_wrap=True, overflow="crop")
    if status["phase"] not in _PARTS:
        text.append(f"  [{status['phase']}]", "bold")
    for phase, part in _PARTS.items():
        took = f" {seconds[part]:.3g} s" if seconds.get(part, 0.0) >= SHOWN_S else ""
        is_now = phase == status["phase"]
        text.append(f"  [{phase}{took}]" if is_now else f"  {phase}{took}", "bold" if is_now else "dim")
    return text


def _credit(credit: dict[str, Any]) -> str:
    share = f" ({100 * credit['samples'] / credit['all']:.1f} %)" if credit["all"] else ""
    return f"{credit['samples']:,}{share}{'' if credit['complete'] else ' so far'}"


def peer_table(rows: list[dict[str, Any]], most: int = 0) -> Table:
    """Peers, one a row; at most so many, 0: all."""
    table = Table(box=None, pad_edge=False)
    for heading in ("peer", "phase"):
        table.add_column(heading)
    for heading in ("round", "samples", "tokens/s", "state"):
        table.add_column(heading, justify="right")
    left_out = len(rows) - most + 1 if most and len(rows) > most else 0
    for row in rows[: len(rows) - left_out]:
        table.add_row(
            row["peer"] if row["peer"].endswith(")") else row["peer"][-8:],
            row["phase"],
            str(row["round"]),
            str(row["samples"]),
            f"{row['tokens_per_s']:,.0f}",
            row["record"][:8],
        )
    if left_out:
        table.add_row(f"{left_out} more")
    return table


def print_status(report: dict[str, Any]) -> None:
    """`p2pllm status`: the panel, or plain lines."""
    if "round" not in report:
        console.print(f"run {report['run_id'][:16]} as '{report['name']}': {report['phase']}", highlight=False)
    elif console.is_terminal:
        console.print(panel(report))
        console.print(f"invite  {report['invite']}", soft_wrap=True, highlight=False)
    else:
        console.print(f"run {report['run_id'][:16]} as '{report['name']}': {report['phase']}", highlight=False)
        console.print(status_line(report), highlight=False, soft_wrap=True)
        for peer in report["peers"]:
            console.print(
                f"peer {peer['peer']} {peer['phase']} round {peer['round']} samples {peer['samples']} "
                f"tokens/s {peer['tokens_per_s']:.0f} record {peer['record'][:16]}",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"invite {report['invite']}", soft_wrap=True, highlight=False)


def curve(values: list[float], width: int = 60) -> str:
    """A line of bars for the last `width` values."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[min(7, int((value - low) / span * 7.999))] for value in shown)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        shown = f"{count:.0f}" if unit == "B" else f"{count:.1f}"
        if float(shown) < 1000:
            return f"{shown} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _title(status: dict[str, Any]) -> Text:
    """The run, short enough not to widen a panel."""
    name = status["run_name"]
    return Text(f"{name if len(name) <= 40 else name[:39] + '…'}  {status['run_id'][:16]}")


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
