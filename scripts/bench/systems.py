"""p2pllm beside other systems on the same machines: same model, text, seed and links.

    .venv/bin/python scripts/bench/systems.py [--scenarios lan home-lines] [--seconds 60] [--peers N] [--short]

Each system trains for so many seconds, one after the other, on the machines of the scenario: namespaces with its links,
CPU budgets, one core's thread a peer. A round has as many samples in all but those with local steps (see `_contest`).
The clock starts, and the budgets begin to hold, when all peers are ready, so starting up counts for nobody.
tokens/s and bytes are taken from the end of the first round to the end of the last. Only tokens that went into an
update count. Efficiency is tokens/s by the sum of what each machine does alone, measured before and after with
`p2pllm_peers.lab.alone`, for local steps with local steps. Bytes are those on the wire that all peers together sent,
with all headers. All peers of all systems evaluate every third round, or as often; between two evaluations the loss is
taken as a straight line. In brackets: multiples of the figure of p2pllm's sync.

What does not live here: how a system trains (`_contest`), the other systems, and figures from records (`baselines`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from _contest import BASE, BASELINES, MICRO_BATCH, OURS, STEPS, Contest, changed, say
from _table import table
from baselines.figures import Round, figures

from p2pllm.errors import P2PLLMError, UsageError
from p2pllm.settings import load_settings
from p2pllm_peers.lab.cleanup.claims import Claims, sweep
from p2pllm_peers.lab.machines import Machines
from p2pllm_peers.lab.scenario import Scenario, fits, load_scenario

SYSTEMS = [*OURS, *BASELINES]
HEAD = ("tokens/s", "efficiency", "wire bytes/token", "s to the loss of {}", "best validation loss")
ALONE_S = 15.0
SHORT_ALONE_S = 8.0


def contest(scenario: Scenario, options: argparse.Namespace, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """All systems in one scenario, as plain values."""
    settings = load_settings(micro_batch=MICRO_BATCH, device="cpu")
    machines = Machines(scenario, folder)
    with machines:
        race = Contest(machines, scenario.run, settings, folder / "baselines", options.steps)
        alone_s = SHORT_ALONE_S if options.short else ALONE_S
        systems: dict[str, Any] = {}
        for name in names:
            measured = BASE if name not in OURS else name
            try:
                before = race.alone(measured, alone_s)
                trained = race.train(name, options.seconds)
                after = race.alone(measured, alone_s)
            except P2PLLMError as error:
                say(f"{name}: {error}")
                systems[name] = {"error": str(error)}
                continue
            alone = {peer: (rate + after[peer]) / 2 for peer, rate in before.items()}
            systems[name] = {"alone_tokens_per_s": alone, **asdict(trained)}
            say(f"{name}: {len(trained.rounds)} rounds, losses {[row.validation_loss for row in trained.rounds][-6:]}")
        emulator = machines.emulator().model_dump(mode="json")
    result = {"scenario": scenario.model_dump(mode="json"), "notes": machines.notes, "emulator": emulator}
    return {**result, "systems": systems, "left_over": machines.left_over}


def target(result: dict[str, Any], loss: str) -> float:
    """Validation loss whose time is compared: a number, or the best one of the system of this name."""
    if loss not in result["systems"]:
        return float(loss)
    losses = [row["validation_loss"] for row in result["systems"][loss].get("rounds", ())]
    return min((each for each in losses if each is not None), default=0.0)


def rows_of(result: dict[str, Any], loss: str) -> list[list[str]]:
    """One row a system: its figures, and in brackets what they are of p2pllm's."""
    cells = {name: _values(system, target(result, loss)) for name, system in result["systems"].items()}
    base = cells.get(BASE)
    formats = ("{:,.0f}", "{:.2f}", "{:,.1f}", "{:.0f}", "{:.2f}")
    rows = []
    for name, values in cells.items():
        row = [f"{result['scenario']['name']}: {name}"]
        for index, (value, form) in enumerate(zip(values, formats, strict=True)):
            ours = base[index] if base and name != BASE else None
            text = "-" if value is None else form.format(value)
            row.append(f"{text} ({value / ours:.2f})" if value is not None and ours else text)
        rows.append(row)
    return rows


def _values(system: dict[str, Any], loss: float) -> list[float | None]:
    if "error" in system:
        return [None] * len(HEAD)
    rounds = [Round(**row) for row in system["rounds"]]
    found = figures(rounds, system["began"], system["wire"], loss)
    alone = sum(system["alone_tokens_per_s"].values())
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
    if options.samples:
        scenario = scenario.model_copy(update={"run": changed(scenario.run, round={"samples": options.samples})})
    if reason := fits(scenario, os.cpu_count() or 1, psutil.virtual_memory().available / 1e6):
        raise UsageError(reason)
    return scenario


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=["lan", "home-lines"], help="names or files, without faults")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--seconds", type=float, help="that each system trains; default 60, with --short 30")
    parser.add_argument("--peers", type=int, default=0, help="machines like the scenario's first, instead of its own")
    parser.add_argument("--samples", type=int, help="of a round without local steps, instead of the scenario's")
    parser.add_argument("--steps", type=int, default=STEPS, help="a peer and round, about, of those with local steps")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--loss", default="3.5", help="validation loss to reach, nats a token, or whose best one")
    parser.add_argument("--out", type=Path, default=Path("systems.json"), help="results as JSON, all rounds included")
    parser.add_argument("--markdown", action="store_true", help="print README's table")
    options = parser.parse_args()
    if options.loss not in options.systems and not re.fullmatch(r"\d+(\.\d+)?", options.loss):
        parser.error(f"--loss is {options.loss!r}, but must be a number or one of the systems that are compared")
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
    rows = [row for result in results["scenarios"] for row in rows_of(result, options.loss)]
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
