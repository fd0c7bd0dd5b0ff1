"""Where a round's time goes outside compute: three peers on loopback, the default model of 0.8 M parameters.

    .venv/bin/python scripts/bench/rounds.py [--peers 3] [--rounds 40]

Every figure is the median over all peers and rounds of one run, with the share of the whole round beside it: the
machine's own speed drops out of the shares.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from p2pllm.manifest import RunDraft
from p2pllm.settings import load_settings
from p2pllm_peers.lab.swarm import swarm_on_loopback

WARM_UP_ROUNDS = 3
OUTSIDE = ("roster", "exchange", "vote", "outer_step", "digest")


def main() -> None:
    """Run a swarm and print its anatomy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    changes = {"rounds": arguments.rounds, "min_peers": arguments.peers}
    draft = RunDraft().model_copy(update={"round": RunDraft().round.model_copy(update=changes)})
    console = Console()
    with (
        tempfile.TemporaryDirectory() as folder,
        swarm_on_loopback(draft, arguments.peers, Path(folder) / "out", load_settings()) as swarm,
    ):
        with console.status("starting") as shown:
            swarm.start(list(swarm.peers), shown.update)
            for peer in swarm.peers.values():
                shown.update(f"training {arguments.rounds} rounds")
                peer.wait_end()
        everything = {peer.name: peer.records() for peer in swarm.peers.values()}
    records = {
        name: [row for row in rows if row["round"] > WARM_UP_ROUNDS and len(row["members"]) == arguments.peers]
        for name, rows in everything.items()
    }
    rows = [row for peer in records.values() for row in peer]
    whole = statistics.median(sum(row["seconds"].values()) for row in rows)
    table = Table(title=f"{arguments.peers} peers, {len(rows)} measured rounds (all peers)")
    for heading in ("part", "median s", "largest s", "of the round"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in ("compute", *OUTSIDE, "validation"):
        seconds = [row["seconds"][part] for row in rows]
        median = statistics.median(seconds)
        table.add_row(part, f"{median:.4f}", f"{max(seconds):.4f}", f"{median / whole:.1%}")
    outside = statistics.median(sum(row["seconds"][part] for part in OUTSIDE) for row in rows)
    table.add_row("outside compute", f"{outside:.4f}", "", f"{outside / whole:.1%}")
    console.print(table)
    digests: dict[int, set[str]] = {}
    for row in (row for rows_of_peer in everything.values() for row in rows_of_peer):
        digests.setdefault(row["round"], set()).add(row["state_digest"])
    differing = [number for number, found in digests.items() if len(found) > 1]
    console.print(f"rounds whose states differ: {differing or 'none'}")


if __name__ == "__main__":
    main()
