"""Rich views of a run of the lab; plain lines, one record a line, where the output is not a terminal."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from p2pllm_cli.view import console, curve
from p2pllm_peers.lab.evidence import Sample
from p2pllm_peers.lab.scenario import PeerSpec, Scenario
from p2pllm_peers.lab.swarm import Swarm

_EVENTS_SHOWN = 6


class LabView:
    """Implements `p2pllm_peers.lab.experiment.Watcher`: a live table of peers and links with the events under it."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._specs = {spec.name: spec for spec in scenario.peer_specs()}
        self._events: deque[str] = deque(maxlen=_EVENTS_SHOWN)
        self._step = "starting"
        self._rows: Table | None = None
        self._head: list[Any] = []
        self._wire: dict[str, tuple[float, int, int]] = {}
        self._shown = 0
        self._lock = threading.Lock()  # events come from several threads
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A step of the preparation or of the end."""
        if self._live is None and text != self._step:
            _line(text)
        self._step = text

    def event(self, t: float, text: str) -> None:
        """Something struck."""
        line = f"{t:7.1f} s  {text}"
        with self._lock:
            self._events.append(line)
            if self._live is None:
                _line(f"event {line.strip()}")

    def show(self, t: float, swarm: Swarm, sample: Sample) -> None:
        """How things are."""
        statuses = [peer.last for peer in swarm.peers.values() if peer.is_up and peer.last]
        if not statuses:
            return
        ahead = max(statuses, key=lambda status: int(status["recorded_round"]))
        achieved = f"{losses(ahead)}  {ahead['swarm_tokens_per_s']:,.0f} tokens/s"
        if self._live is None:
            if ahead["recorded_round"] != self._shown:
                self._shown = ahead["recorded_round"]
                _line(f"round {ahead['recorded_round']} at {t:.1f} s  {achieved}")
            return
        lasts = self._scenario.duration_s
        seconds, rounds = (f" of {lasts:.0f}", "") if lasts else ("", f" of {ahead['rounds']}")
        self._head = [Text(f"{t:.0f}{seconds} s  round {ahead['recorded_round']}{rounds}  {achieved}")]
        if len(ahead["losses"]) > 1:
            self._head.append(Text(f"loss {curve(ahead['losses'])}", no_wrap=True, overflow="crop"))
        self._rows = self._table(t, swarm, sample)

    def _table(self, t: float, swarm: Swarm, sample: Sample) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # all of it fits into 80 columns
        for heading in ("peer", "core", "link", "doing"):
            table.add_column(heading, no_wrap=True)
        for heading in ("round", "tok/s", "up/s", "down/s", "state"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, row in sample.peers.items():
            peer, spec = swarm.peers[name], self._specs[name]
            doing = "frozen" if peer.frozen else row.phase or ("starting" if peer.is_running else "down")
            up, down = self._rates(name, t, row.wire_up, row.wire_down)
            table.add_row(
                name,
                f"{spec.cores:g}" if spec.cores else "-",
                link_text(spec),
                doing,
                str(row.round),
                f"{row.tokens_per_s:,.0f}",
                up,
                down,
                row.digest[:6],
            )
        return table

    def _rates(self, name: str, t: float, up: int | None, down: int | None) -> tuple[str, str]:
        """Bytes a second on the wire since the last look."""
        if up is None or down is None:
            return "-", "-"
        before, self._wire[name] = self._wire.get(name), (t, up, down)
        if before is None or t <= before[0]:
            return "-", "-"
        return compact((up - before[1]) / (t - before[0])), compact((down - before[2]) / (t - before[0]))

    def _render(self) -> Panel:
        with self._lock:
            events = [Text(line) for line in self._events]
        table = [*self._head, self._rows] if self._rows is not None else []
        title, bottom = Text(f"lab: {self._scenario.name}"), Text("Ctrl+C ends it")
        return Panel(Group(*table, Text(self._step), *events), title=title, subtitle=bottom)


def losses(status: dict[str, Any]) -> str:
    """Training and validation loss, as far as they are known."""
    known = [("loss", status["loss"]), ("validation", status["validation_loss"])]
    return "  ".join(f"{name} {value:.4f}" for name, value in known if value is not None)


def compact(count: float) -> str:
    """Bytes in four characters or so: 999, 12k, 1.5M."""
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"


def link_text(spec: PeerSpec) -> str:
    """A peer's line in few characters: rates in Mbit/s, delay one way."""
    link = spec.link
    if link is None:
        return "loopback"
    text = f"{link.up_mbit:g}/{link.down_mbit:g} {link.delay_ms:.0f}ms"
    return text + (f" {link.loss:.1%}" if link.loss else "") + (" nat" if link.nat else "")


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """A name and what it is, one a line."""
    found = list(pairs)
    width = max(len(name) for name, _ in found)
    for name, text in found:
        _line(f"{name:{width}}  {text}")


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """A table whose first row is its heading; tabs between the columns where it is not a terminal."""
    if not console.is_terminal:
        for row in rows:
            _line("\t".join(row))
        return
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def _line(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
