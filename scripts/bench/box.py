"""What the lab's network box holds: every peer sends to the next one at full rate, all at once; needs root.

    .venv/bin/python scripts/bench/box.py [--peers 4] [--mbit 100] [--seconds 5]

Rates are those of one TCP stream a peer, counted on the wire, as ratios to the rates asked for; each line carries
full traffic one way and acknowledgements the other, or, with every peer sending and receiving, both. The box's CPU
share is of one core and includes what the kernel does in its name: the receiving peer's whole TCP input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from dataclasses import asdict, replace

from _table import table

from p2pllm_peers.lab import links
from p2pllm_peers.lab.checking import WIRE_PER_PAYLOAD, answer, phase, plan, program
from p2pllm_peers.lab.claims import Claims
from p2pllm_peers.lab.scenario import Link

HEAD = ["each line", "least", "mean", "trip ms", "asked", "Mbit/s", "frames/s", "CPU", "late p99 ms", "max ms"]
PROBE = [sys.executable, "-m", "p2pllm_peers.lab.probe"]


def measure(peers: int, link: Link, seconds: float) -> list[str]:
    """One row: ratios of the rates, median round trip, and what the box did meanwhile."""
    with Claims.open() as claims, contextlib.ExitStack() as stack:
        star = links.Links(claims, {f"peer-{index}": link for index in range(peers)}, kind="box")
        star.start()
        stack.callback(star.stop)
        names = [f"peer-{index}" for index in range(peers)]
        for name in names:
            answer(stack.enter_context(program([*star.prefix(name), *PROBE, "serve"])), name)
        how = json.dumps(asdict(replace(plan(replace_line(link), peers), count_s=seconds)))
        senders = {
            name: stack.enter_context(program([*star.prefix(name), *PROBE, "measure", star.address(other), how]))
            for name, other in zip(names, [*names[1:], names[0]], strict=True)
        }
        trips = [row["trip_ms"] for row in phase(senders, "ping").values()]
        before = star.emulator()
        ratios = [rate * WIRE_PER_PAYLOAD * 8e-6 / link.up_mbit for rate in phase(senders, "up").values()]
        after = star.emulator()
    wall = after.wall_s - before.wall_s
    asked = 4 * float(str(link.delay_ms)) + 2 * link.jitter_ms
    return [
        f"{min(ratios):.3f}",
        f"{statistics.mean(ratios):.3f}",
        f"{statistics.median(trips):.2f}",
        f"{asked:.2f}",
        f"{(after.bytes - before.bytes) * 8e-6 / wall:.0f}",
        f"{(after.frames - before.frames) / wall:.0f}",
        f"{(after.cpu_s - before.cpu_s) / wall:.2f}",
        f"{after.late_p99_ms:.2f}",
        f"{after.late_max_ms:.2f}",
    ]


def replace_line(link: Link) -> Link:
    """A path crosses two lines: twice the delay of one."""
    return link.model_copy(update={"delay_ms": 2 * float(str(link.delay_ms)), "jitter_ms": 2 * link.jitter_ms})


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    if reason := links.why_not():
        sys.exit(f"{reason}.")
    line = Link(up_mbit=arguments.mbit, down_mbit=arguments.mbit, delay_ms=0.0)
    cases = {
        "no delay": line,
        "10 ms": line.model_copy(update={"delay_ms": 10.0}),
        "10 ms, 2 ms jitter, 0.5 % loss": line.model_copy(update={"delay_ms": 10.0, "jitter_ms": 2.0, "loss": 0.005}),
        "50 ms": line.model_copy(update={"delay_ms": 50.0}),
    }
    rows = [[name, *measure(arguments.peers, link, arguments.seconds)] for name, link in cases.items()]
    print(f"{arguments.peers} peers, {arguments.mbit:g} Mbit/s up and down each, all sending at once")
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
