"""How long a newcomer takes: from `p2pllm join` to its first committed contribution, and what `--help` costs.

    .venv/bin/python scripts/bench/join.py [--repeats 5]

A founder trains the default model alone on one core; each repetition is a volunteer with an empty folder, pinned to
the other core. Beside it runs the floor of any such program in this venv: a bare interpreter that imports what the
worker must (torch and transformers), so the ratio holds on any machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from p2pllm.manifest import RunDraft
from p2pllm.settings import load_settings
from p2pllm_peers.lab.swarm import Swarm, SwarmPeer, swarm_on_loopback

LIMIT_S = 120.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    console = Console()
    draft = RunDraft().model_copy(update={"round": RunDraft().round.model_copy(update={"rounds": 10**6})})
    joins, floors, helps = [], [], []
    cores = sorted(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        swarm_on_loopback(draft, 1 + repeats, Path(folder) / "out", load_settings()) as swarm,
    ):
        founder, *volunteers = swarm.peers.values()
        with console.status("starting the founder") as shown:
            os.sched_setaffinity(0, {cores[0]})  # what is started from here on stays on this core
            swarm.start([founder.name], shown.update)
            os.sched_setaffinity(0, {cores[-1]})
            for volunteer in volunteers:
                shown.update(f"{volunteer.name} of {repeats} joins")
                floors.append(timed([sys.executable, "-c", "import torch, transformers.models.llama.modeling_llama"]))
                helps.append(timed([sys.executable, "-m", "p2pllm_cli.main", "--help"]))
                joins.append(first_contribution(swarm, volunteer))
    table = Table(title=f"{repeats} joins, one core a peer")
    for heading in ("what", "median s", "smallest", "largest"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, values in (
        ("join to first committed contribution", joins),
        ("import torch and a transformers model", floors),
        ("p2pllm --help", helps),
    ):
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}")
    console.print(table)
    console.print(f"a join is {statistics.median(a / b for a, b in zip(joins, floors, strict=True)):.1f} x that import")


def timed(command: list[str]) -> float:
    """Wall seconds of a command."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def first_contribution(swarm: Swarm, peer: SwarmPeer) -> float:
    """Seconds from the start of a new volunteer to the commit of the first round that names it; it then leaves."""
    begin = time.time()
    swarm.join(peer.name, lambda text: None)
    try:
        while (committed := first_commit(peer)) is None:
            if time.time() - begin > LIMIT_S:
                raise SystemExit(f"{peer.name} has contributed to no round after {LIMIT_S:.0f} s")
            time.sleep(0.02)  # a file has no event that works everywhere
    finally:
        peer.leave()
        peer.wait_gone(15)
    return committed - begin


def first_commit(peer: SwarmPeer) -> float | None:
    """When the peer's first own contribution was committed, Unix time."""
    return next((row["unix_time"] for row in peer.records() if peer.ready["peer_id"] in row["members"]), None)


if __name__ == "__main__":
    main()
