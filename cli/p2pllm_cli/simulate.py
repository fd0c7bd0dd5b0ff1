"""lab simulate: the protocol with thousands of peers on one core, in virtual time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pllm.errors import UsageError

if TYPE_CHECKING:
    from p2pllm_peers.lab.simulation.simulator import Progress

HEADINGS = (
    "peers", "msg/s", "kB/s", "all known s", "know", "first roster s", "in a roster", "rounds", "outside s",
    "rosters", "branches", "failed", "left out", "virtual s", "real s", "MB",
)  # fmt: skip
"""msg/s and kB/s: see `ledger.sent_a_second`."""


@click.command(short_help="The protocol with thousands of peers, in virtual time.")
@click.option("--peers", "sizes", type=int, multiple=True, help="Peers of a swarm; more sizes may follow.")
@click.argument("more", type=int, nargs=-1, metavar="")
@click.option("--rounds", default=3, show_default=True, help="Rounds to do, of 10 virtual seconds each.")
@click.option("--churn", default=0.0, show_default=True, help="Faults an hour for each 100 peers.")
@click.option("--delay-ms", type=float, nargs=2, default=(20.0, 80.0), show_default=True, help="Of a path, one way.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same result.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all results there.")
def simulate(
    sizes: tuple[int, ...],
    more: tuple[int, ...],
    rounds: int,
    churn: float,
    delay_ms: tuple[float, float],
    seed: int,
    path: Path | None,
) -> None:
    """Simulate swarms of several sizes with the real protocol code, without training and without a real network.

    Say the sizes as in `--peers 10 30 100`; without --peers 10 and 100. One round of 1,000 takes two to three minutes
    of a core, one of 10,000 about twenty and 1.2 GB; the largest swarms are simulated for fewer virtual seconds.
    """
    from p2pllm_cli.lab_view import print_rows
    from p2pllm_peers.lab.simulation.process import simulate_apart
    from p2pllm_peers.lab.simulation.simulator import Setting

    if more and not sizes:
        raise UsageError("Say the sizes of the swarms after --peers, as in --peers 10 30 100.")
    settings = [Setting(peers, rounds, churn, delay_ms, seed) for peers in (*sizes, *more) or (10, 100)]
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"The folder {path.parent} of --json is not there; make it first.")
    results = []
    with _progress() as progress:
        for setting in settings:
            results.append(simulate_apart(setting, progress))
            if path is not None:  # after every size: the next one may take an hour
                path.write_text(json.dumps(results, indent=1) + "\n")
    print_rows([HEADINGS, *map(_row, results)])
    print_rows([("sent by a peer a second", *_kinds(results[0])), *_traffic(results)])
    _print_notes(results)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A spinner with the state of things; silence where the output is not a terminal."""
    from p2pllm_cli.view import console

    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield status.update


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    from p2pllm_peers.lab.simulation.ledger import sent_a_second

    messages, size = sent_a_second(result)
    known = result["known"]
    return (
        f"{result['peers']}",
        f"{messages:.1f}",
        f"{size / 1000:.1f}",
        _seconds(known["all_known_s"]),
        f"{known['mean']:.0f} of {known['possible']}",
        _seconds(result["first_roster_s"]),
        f"{result['in_first_rosters']:.1%}",
        f"{result['rounds_committed']} of {result['rounds']}",
        _seconds(result["outside_s"], 3),
        f"{result['rosters_a_round']:g}",
        f"{result['most_branches']}",
        f"{result['failed_attempts']}",
        f"{result['left_out']}",
        f"{result['virtual_s']:.0f}",
        f"{result['real_s']:.1f}",
        f"{result['memory_mb']:.0f}",
    )


def _seconds(value: float | None, digits: int = 1) -> str:
    return "never" if value is None else f"{value:.{digits}f}"


def _kinds(result: dict[str, Any]) -> list[str]:
    return list(result["forming"])


def _traffic(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row a size and stage: messages and bytes of each kind."""
    return [
        (
            f"{result['peers']} peers, {stage}",
            *(f"{rate['messages']:.2f} / {rate['bytes']:.0f} B" for rate in result[stage].values()),
        )
        for result in results
        for stage in ("forming", "training")
    ]


def _print_notes(results: list[dict[str, Any]]) -> None:
    from p2pllm_cli.view import console

    for result in results:
        for note in result["notes"]:
            console.print(f"{result['peers']} peers: {note}", highlight=False, soft_wrap=True)
