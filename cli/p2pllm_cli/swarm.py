"""swarm: many peers of one run on this machine, without terminals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from p2pllm.errors import UsageError


@click.command(short_help="Train with several peers on this machine.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--peers", default=3, show_default=True, help="Daemons to start.")
@click.option("--rounds", type=int, help="Rounds to train, instead of the run file's.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True,
              help="Folder of the peers' folders, their logs and report.json.")  # fmt: skip
def swarm(path: Path, peers: int, rounds: int | None, out: Path) -> None:
    """Train the run of a run file with several real peers on this machine, on loopback."""
    from p2pllm.manifest import load_draft
    from p2pllm_cli.options import settings_of
    from p2pllm_cli.view import StartView, SwarmView, console
    from p2pllm_peers.lab.swarm import Swarm

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
    with Swarm(draft, out, settings_of({"cache": None})) as running:
        with StartView() as starting:
            running.start(peers, starting.progress)
        with SwarmView() as view:
            for statuses in running.watch():
                view.update(statuses)
        report = running.report()
    for line in summary(report):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.json'}", highlight=False, soft_wrap=True)
    if report["diverged_rounds"]:
        raise SystemExit(1)


def summary(report: dict[str, Any]) -> list[str]:
    """What a swarm did, in a few lines."""
    rounds = report["rounds"]
    if not rounds:
        return ["no round was committed"]
    validated = [row for row in rounds if row["validation_loss"] is not None]
    lines = [f"rounds committed: {report['rounds_committed']}, tokens: {report['tokens']:,}"]
    if report["tokens_per_s"]:
        lines[0] += f", {report['tokens_per_s']:,.0f} tokens/s"
    lines.append(f"training loss: {rounds[0]['loss']:.4f} -> {rounds[-1]['loss']:.4f}")
    if validated:
        lines.append(
            f"validation loss: {validated[0]['validation_loss']:.4f} (round {validated[0]['round']}) -> "
            f"{validated[-1]['validation_loss']:.4f} (round {validated[-1]['round']})"
        )
    if report["overhead_median_s"] is not None:
        parts = ", ".join(f"{part} {row['median']:.3f}" for part, row in report["round_seconds"].items())
        lines.append(f"a round outside compute: median {report['overhead_median_s']:.3f} s; medians: {parts}")
    diverged = report["diverged_rounds"]
    lines.append(f"states differ after rounds {diverged}" if diverged else "states are identical after every round")
    return lines
