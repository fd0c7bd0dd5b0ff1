"""p2pllm beside other systems on the same machines: same model, text, seed, optimizer and global batch.

    .venv/bin/python scripts/bench/systems.py [--scenarios lan home-lines] [--seconds 60] [--peers N] [--short]

Each system trains for so many seconds, one after the other, on the machines of the scenario: namespaces with its links,
CPU budgets, one core's thread a peer. The clock starts, and the budgets begin to hold, when all peers are ready, so
starting up counts for nobody. tokens/s and bytes are taken from the end of the first round to the end of the last.
Only tokens that went into an update count. Efficiency is tokens/s by the sum of what each machine does alone, measured
before with `p2pllm_peers.lab.alone`. Bytes are those on the wire that all peers together sent, with all headers. All
peers of all systems evaluate every third round; between two evaluations the loss is taken as a straight line. In
brackets: multiples of p2pllm's figure.

What does not live here: the other systems, and figures from records (`baselines`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from _table import table
from baselines.figures import Figures, Round, Wire, figures, rounds_of
from baselines.fleet import Fleet, System

from p2pllm.errors import P2PLLMError, RunError, UsageError
from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings, load_settings
from p2pllm_peers.lab.alone import measure_alone
from p2pllm_peers.lab.cleanup.claims import Claims, sweep
from p2pllm_peers.lab.machines import Machines
from p2pllm_peers.lab.scenario import Scenario, fits, load_scenario
from p2pllm_peers.lab.swarm import Swarm

OURS = "p2pllm sync"
BASELINES = {
    "torch DDP, gloo": System("baselines.ddp"),
    "hivemind, tuned": System("baselines.hivemind_optimizer", {"settings": "tuned"}),
    "hivemind, defaults": System("baselines.hivemind_optimizer", {"settings": "defaults"}),
    "one machine alone": System("baselines.solo", machines=1),
}
HEAD = ("tokens/s", "efficiency", "wire bytes/token", "s to loss {}", "best validation loss")

MICRO_BATCH = 8
"""Samples that every system computes at once: the fastest for the default model on a core of a 2020s server."""

VALIDATION_EVERY = 3
"""Rounds. Fewer than the scenarios have, as there are only some ten rounds; it costs each peer 3 % of its time."""

LOOK_EVERY_S = 0.5
SLACK_S = 10.0
"""Baselines go on for so long after the clock has stopped, so that none ends while another still counts on it."""

ALONE_S = 15.0
SHORT_ALONE_S = 8.0


@dataclass(frozen=True)
class Trained:
    """What one system did. began: unix time at which all were ready."""

    began: float
    rounds: list[Round]
    wire: Wire


class Contest:
    """The systems on the machines of one scenario, which are there."""

    def __init__(self, machines: Machines, draft: RunDraft, settings: PeerSettings, folder: Path) -> None:
        """folder: for records and logs of the baselines."""
        peers = len(machines.specs)
        # The first round begins when all are there, as it does for the other systems.
        rounds = draft.round.model_copy(update={"min_peers": peers})
        data = draft.data.model_copy(update={"validation_every": VALIDATION_EVERY})
        self._draft = draft.model_copy(update={"round": rounds, "data": data})
        self._machines = machines
        self._settings = settings
        self._folder = folder

    def alone(self, seconds: float) -> dict[str, float]:
        """Tokens/s of each machine alone."""
        return measure_alone(self._machines, self._draft, self._settings, seconds, say, time.sleep)

    def train(self, name: str, seconds: float) -> Trained:
        """One system for so long. Raises P2PLLMError if it fails."""
        say(f"{name}: starting")
        trained = self._ours(seconds) if name == OURS else self._baseline(name, seconds)
        in_time = [each for each in trained.rounds if each.unix_time <= trained.began + seconds]
        return replace(trained, rounds=in_time)

    def _ours(self, seconds: float) -> Trained:
        with Swarm(self._machines, self._draft, self._settings) as swarm:
            swarm.start(list(swarm.peers), say)

            def check() -> None:
                for peer in swarm.peers.values():
                    if not peer.is_up:
                        raise RunError(f"{OURS}: {peer.name} ended: {'; '.join(peer.crashes) or 'no message'}.")

            began, wire = self._watch(seconds, check)
            records = [row for peer in swarm.peers.values() for row in peer.records()]
        by_number = {row["round"]: row for row in sorted(records, key=lambda row: -row["unix_time"])}
        rounds = [
            Round(number, row["unix_time"], row["tokens"], row["loss"], row["validation_loss"])
            for number, row in sorted(by_number.items())
        ]
        return Trained(began, rounds, wire)

    def _baseline(self, name: str, seconds: float) -> Trained:
        system, settings = BASELINES[name], self._settings
        folder = self._folder / name.replace(" ", "-").replace(",", "")
        with Fleet(system, self._machines, self._draft, folder, settings.cache, settings.micro_batch) as fleet:
            fleet.start(say)
            began, wire = self._watch(seconds, fleet.check, lambda: fleet.go(seconds + SLACK_S))
            rounds = rounds_of(fleet.rows())
        return Trained(began, rounds, wire)

    def _watch(
        self, seconds: float, check: Callable[[], None], go: Callable[[], None] = lambda: None
    ) -> tuple[float, Wire]:
        """Let the peers train under their budgets; returns when that began, and what the wires counted."""
        wire: list[tuple[float, int]] = []
        with self._budgets():
            go()
            began, end = time.time(), time.monotonic() + seconds
            say(f"training for {seconds:g} s")
            while time.monotonic() < end:
                counted = self._machines.counters()
                if counted:
                    wire.append((time.time(), sum(up for up, _ in counted.values())))
                time.sleep(min(LOOK_EVERY_S, max(0.0, end - time.monotonic())))
                check()
        return began, wire

    @contextlib.contextmanager
    def _budgets(self) -> Iterator[None]:
        """Each machine has its share of a core."""
        for name, spec in self._machines.specs.items():
            self._machines.limit(name, spec.cores)
        try:
            yield
        finally:
            for name in self._machines.specs:
                self._machines.limit(name, 0)


def contest(scenario: Scenario, options: argparse.Namespace, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """All systems in one scenario, as plain values."""
    settings = load_settings(micro_batch=MICRO_BATCH, device="cpu")
    machines = Machines(scenario, folder)
    with machines:
        race = Contest(machines, scenario.run, settings, folder / "baselines")
        alone = race.alone(SHORT_ALONE_S if options.short else ALONE_S)
        result = {"scenario": scenario.model_dump(mode="json"), "notes": machines.notes, "alone_tokens_per_s": alone}
        systems: dict[str, Any] = {}
        for name in names:
            try:
                trained = race.train(name, options.seconds)
            except P2PLLMError as error:
                say(f"{name}: {error}")
                systems[name] = {"error": str(error)}
                continue
            found = figures(trained.rounds, trained.began, trained.wire, options.loss)
            say(f"{name}: {found}")
            systems[name] = {"figures": asdict(found), **asdict(trained)}
        result["emulator"] = machines.emulator().model_dump(mode="json")
    return {**result, "systems": systems, "left_over": machines.left_over}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """One row a system: its figures, and in brackets what they are of p2pllm's."""
    alone = sum(result["alone_tokens_per_s"].values())
    cells = {name: _values(system, alone) for name, system in result["systems"].items()}
    ours = cells.get(OURS)
    formats = ("{:,.0f}", "{:.2f}", "{:,.1f}", "{:.0f}", "{:.2f}")
    rows = []
    for name, values in cells.items():
        row = [f"{result['scenario']['name']}: {name}"]
        for index, (value, form) in enumerate(zip(values, formats, strict=True)):
            base = ours[index] if ours and name != OURS else None
            text = "-" if value is None else form.format(value)
            row.append(f"{text} ({value / base:.2f})" if value is not None and base else text)
        rows.append(row)
    return rows


def _values(system: dict[str, Any], alone: float) -> list[float | None]:
    if "error" in system:
        return [None] * len(HEAD)
    found = Figures(**system["figures"])
    efficiency = found.tokens_per_s / alone if found.tokens_per_s is not None and alone else None
    return [found.tokens_per_s, efficiency, found.bytes_per_token, found.seconds_to_loss, found.best_loss]


def notes_of(result: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    name, emulator = result["scenario"]["name"], result["emulator"]
    failed = [f"{name}: {system['error']}" for system in result["systems"].values() if "error" in system]
    late = f"{name}: links made by {emulator['kind']}, 99 % of the frames at most {emulator['late_p99_ms']:.1f} ms late"
    return [*result["notes"], *failed, late, *result["left_over"]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as README has it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def chosen(name: str, options: argparse.Namespace) -> Scenario:
    """A scenario with as many peers as asked. Raises UsageError if it cannot be compared, or not on this machine."""
    scenario = load_scenario(name, short=options.short)
    if scenario.events or scenario.churn.faults_per_hour or any(peers.start_s for peers in scenario.peers):
        raise UsageError(f"The scenario {name} has faults or late peers, which DDP does not survive; name another one.")
    if options.peers:
        first = scenario.peers[0].model_copy(update={"count": options.peers})
        scenario = scenario.model_copy(update={"peers": (first,)})
    if reason := fits(scenario, os.cpu_count() or 1, psutil.virtual_memory().available / 1e6):
        raise UsageError(reason)
    return scenario


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["lan", "home-lines"], help="names or files, without faults")
    parser.add_argument("--systems", nargs="+", choices=[OURS, *BASELINES], default=[OURS, *BASELINES])
    parser.add_argument("--seconds", type=float, help="that each system trains; default 60, with --short 30")
    parser.add_argument("--peers", type=int, default=0, help="machines like the scenario's first, instead of its own")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--loss", type=float, default=3.5, help="validation loss to reach, nats a token")
    parser.add_argument("--out", type=Path, default=Path("systems.json"), help="results as JSON, all rounds included")
    parser.add_argument("--markdown", action="store_true", help="print README's table")
    options = parser.parse_args()
    options.seconds = options.seconds or (30.0 if options.short else 60.0)
    return options


def main() -> None:
    """Run everything and print the table."""
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in order, as Ctrl+C does
    versions = {name: importlib.metadata.version(name) for name in ("p2pllm", "hivemind", "torch")}
    results: dict[str, Any] = {"versions": versions, "cpus": os.cpu_count(), "loss": options.loss, "scenarios": []}
    scenarios = [chosen(name, options) for name in options.scenarios]
    for undone in sweep():
        say(undone)
    for scenario in scenarios:
        with Claims.open() as claims:  # so that the folder goes even if we are killed
            folder = Path(claims.note("folder", f"{tempfile.gettempdir()}/{claims.name('bench')}"))
            folder.mkdir(mode=0o700)
            results["scenarios"].append(contest(scenario, options, options.systems, folder))
        options.out.write_text(json.dumps(results, indent=1))
    head = ["system", *(text.format(options.loss) for text in HEAD)]
    rows = [row for result in results["scenarios"] for row in rows_of(result)]
    print(markdown(head, rows) if options.markdown else table(head, rows))
    for note in (note for result in results["scenarios"] for note in notes_of(result)):
        print(note)


if __name__ == "__main__":
    try:
        main()
    except P2PLLMError as error:
        print(f"systems: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
