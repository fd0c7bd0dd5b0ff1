"""lab: run a scenario on this machine, look at what came of it, compare two runs; `swarm`: the plainest scenario."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pllm.errors import RunError, UsageError
from p2pllm_cli.simulate import simulate

if TYPE_CHECKING:
    from p2pllm_peers.lab.scenario import Scenario

_OUT = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True,
    help="New or empty folder for the peers' disks, their records and the report.",
)  # fmt: skip
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(short_help="Many peers, real links and faults on this machine.")
def lab() -> None:
    """Swarms of real peers on this machine, with links and faults made on purpose, and measured."""


@lab.command(short_help="Run a scenario.")
@click.argument("scenario")
@_OUT
@click.option("--short", is_flag=True, help="The scenario's short form, in minutes.")
@click.option("--seed", type=int, help="Another seed than the scenario's.")
def run(scenario: str, out: Path, short: bool, seed: int | None) -> None:
    """Run a shipped scenario by its name, or a scenario file; exits with 0 if its verdict holds, 1 if not."""
    from p2pllm_peers.lab.scenario import load_scenario

    report = experiment(load_scenario(scenario, short=short, seed=seed), out, short=short)
    _print_summary(report, out)
    _exit_by(report)


@lab.command(name="report", short_help="Work out the report of a run again.")
@click.argument("folder", type=_FOLDER)
def report_(folder: Path) -> None:
    """Read what a run left in FOLDER and write report.json and report.html there."""
    _print_summary(_written_report(folder), folder)


@lab.command(short_help="Two runs side by side.")
@click.argument("folder_a", type=_FOLDER)
@click.argument("folder_b", type=_FOLDER)
def compare(folder_a: Path, folder_b: Path) -> None:
    """What two runs measured, side by side, with ratios."""
    from p2pllm_cli.lab_view import print_rows
    from p2pllm_peers.lab.evidence import Evidence
    from p2pllm_peers.lab.reporting.compare import compare as compared
    from p2pllm_peers.lab.reporting.compare import rows
    from p2pllm_peers.lab.reporting.report import report

    print_rows(rows(compared(report(Evidence(folder_a)), report(Evidence(folder_b)))))


@lab.command(short_help="The shipped scenarios.")
@click.option("--fields", is_flag=True, help="What a scenario file may say, instead.")
def scenarios(fields: bool) -> None:
    """List the scenarios that come with p2pllm, one a line."""
    from p2pllm_cli.lab_view import print_pairs
    from p2pllm_peers.lab.scenario import describe, shipped

    if fields:
        print_pairs([(f"{place} = {default}", text) for place, default, text in describe()])
    else:
        print_pairs(shipped())


lab.add_command(simulate)


@click.command(short_help="Train with several peers on this machine.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--peers", default=3, show_default=True, help="Daemons to start.")
@click.option("--rounds", type=int, help="Rounds to train, instead of the run file's.")
@_OUT
def swarm(path: Path, peers: int, rounds: int | None, out: Path) -> None:
    """Train the run of a run file with several real peers on loopback: a scenario without links and faults."""
    from p2pllm.manifest import load_draft
    from p2pllm_peers.lab.swarm import plain_scenario

    draft = load_draft(path)
    if not 1 <= peers <= draft.round.max_peers:
        raise UsageError(f"--peers is {peers}, but must be from 1 to the run's max_peers, {draft.round.max_peers}.")
    if peers < draft.round.min_peers:
        raise UsageError(
            f"--peers is {peers}, but the run begins only with min_peers, which is {draft.round.min_peers}."
        )
    if rounds is not None:
        if not 1 <= rounds <= 10**9:
            raise UsageError(f"--rounds is {rounds}, but must be at least 1 and at most {10**9}.")
        draft = draft.model_copy(update={"round": draft.round.model_copy(update={"rounds": rounds})})
    report = experiment(plain_scenario(draft, peers), out)
    _print_summary(report, out)
    _exit_by(report)


def experiment(scenario: Scenario, out: Path, *, short: bool = False) -> dict[str, Any]:
    """Run it with a live view; returns its report, which is also written into the folder.

    Raises P2PLLMError if this machine cannot hold it or the run cannot begin. Exits with 130 if it was interrupted.
    """
    import os

    import psutil

    from p2pllm_cli.lab_view import LabView
    from p2pllm_cli.options import settings_of
    from p2pllm_peers.lab.experiment import Experiment
    from p2pllm_peers.lab.scenario import fits

    if reason := fits(scenario, os.cpu_count() or 1, psutil.virtual_memory().available / 1e6):
        raise UsageError(reason)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # whoever ends it has the report of what there was, too
    with LabView(scenario) as view:
        facts = Experiment(scenario, out, settings_of({}), view, short=short).run()
    report = _written_report(out)
    if facts.interrupted:
        _print_summary(report, out)
        raise SystemExit(130)
    return report


def _written_report(folder: Path) -> dict[str, Any]:
    """The report of a run, worked out and written as report.json and, where the extra is there, report.html."""
    import json

    from p2pllm_peers.lab.evidence import Evidence
    from p2pllm_peers.lab.reporting.page import write_page
    from p2pllm_peers.lab.reporting.report import report

    found = report(Evidence(folder))
    (folder / "report.json").write_text(json.dumps(found, indent=1))
    try:
        write_page(found, folder / "report.html")
    except UsageError as error:  # no plots without the extra; the numbers are there
        (folder / "report.html").unlink(missing_ok=True)  # an earlier page would not tell the same
        click.echo(f"p2pllm: {error}", err=True)
    return found


def _print_summary(report: dict[str, Any], folder: Path) -> None:
    from p2pllm_cli.view import console
    from p2pllm_peers.lab.reporting.report import summary_lines

    for line in summary_lines(report):
        console.print(line, highlight=False, soft_wrap=True)
    for name in ("report.html", "report.json"):
        if (folder / name).exists():
            console.print(f"report: {folder / name}", highlight=False, soft_wrap=True)
            return


def _exit_by(report: dict[str, Any]) -> None:
    if not report["passed"]:
        raise SystemExit(RunError.exit_code)
