"""What the control plane costs as swarms grow: messages and bytes a peer, and what the simulation itself takes.

    .venv/bin/python scripts/bench/simulator.py [--peers 10 30 100] [--rounds 2]

Every size is simulated in a process of its own, see `p2pllm lab simulate`; ratios are to the first size.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from _table import table

from p2pllm_peers.lab.simulation.ledger import sent_a_second
from p2pllm_peers.lab.simulation.process import simulate_apart
from p2pllm_peers.lab.simulation.simulator import Setting

HEAD = (
    "peers", "msg/s a peer", "ratio", "kB/s a peer", "ratio", "virtual s", "CPU s", "CPU us a message", "MB",
    "MB a peer",
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    results = []
    for peers in arguments.peers:
        sys.stderr.write(f"simulating {peers} peers\n")
        results.append(simulate_apart(Setting(peers, arguments.rounds)))
    print(table(HEAD, [row(result, results[0]) for result in results]))


def row(result: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """One line of the table."""
    (messages, size), (first_messages, first_size) = sent_a_second(result), sent_a_second(baseline)
    peers = result["peers"]
    extra = (result["memory_mb"] - baseline["memory_mb"]) / max(1, peers - baseline["peers"])
    return [
        str(peers),
        f"{messages:.1f}",
        f"{messages / first_messages:.1f}" if first_messages else "",
        f"{size / 1000:.2f}",
        f"{size / first_size:.1f}" if first_size else "",
        f"{result['virtual_s']:.0f}",
        f"{result['cpu_s']:.1f}",
        f"{1e6 * result['cpu_s'] / max(1, result['messages']):.0f}",
        f"{result['memory_mb']:.0f}",
        f"{extra:.2f}" if result is not baseline else "",
    ]


if __name__ == "__main__":
    main()
