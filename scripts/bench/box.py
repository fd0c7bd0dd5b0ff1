"""What the lab's network box holds: every peer sends to the next one at full rate, all at once; needs root.

    .venv/bin/python scripts/bench/box.py [--peers 4] [--mbit 100] [--seconds 5]

Every line is full both ways. Rates are those of TCP streams, counted on the wire, as ratios to the rate that was asked
for: the least and the mean of all peers. "trip" is the median round trip of datagrams on idle lines. The CPU is the
box's, in cores, while the streams run, and includes the TCP input of all receiving peers, which the kernel works off
in the box's name. Several streams a peer make smaller frames, and so more work of the same bytes. At the defaults the
box took 0.14 to 0.27 of a 2.1 GHz core with one stream, and with four 0.25 to 0.40 while nothing else ran on the two
cores, up to 0.49 while something did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from dataclasses import asdict, replace

from _table import table

from p2pllm_peers.lab.cleanup.claims import Claims
from p2pllm_peers.lab.network import links
from p2pllm_peers.lab.network.checking import WIRE_PER_PAYLOAD, answer, phase, plan, program
from p2pllm_peers.lab.scenario import Link

HEAD = [
    "each line",
    "streams",
    "least",
    "mean",
    "trip ms",
    "asked",
    "Mbit/s",
    "frames/s",
    "CPU",
    "late p99 ms",
    "max ms",
]
PROBE = [sys.executable, "-m", "p2pllm_peers.lab.network.probe"]


def measure(peers: int, link: Link, streams: int, seconds: float) -> list[str]:
    """One row: ratios of the rates, median round trip, and what the box did meanwhile."""
    with Claims.open() as claims, contextlib.ExitStack() as stack:
        star = links.Links(claims, {f"peer-{index}": link for index in range(peers)}, kind="box")
        star.start()
        stack.callback(star.stop)
        names = [f"peer-{index}" for index in range(peers)]
        for name in names:
            answer(stack.enter_context(program([*star.prefix(name), *PROBE, "serve"])), name)
        how = json.dumps(asdict(replace(plan(path(link), peers), count_s=seconds, streams=streams)))
        senders = {
            name: stack.enter_context(program([*star.prefix(name), *PROBE, "measure", star.address(other), how]))
            for name, other in zip(names, [*names[1:], names[0]], strict=True)
        }
        trips = [row["trip_ms"] for row in phase(senders, "ping").values()]
        before = star.emulator()
        ratios = [rate * WIRE_PER_PAYLOAD * 8e-6 / link.up_mbit for rate in phase(senders, "up").values()]
        after = star.emulator()
    wall = after.wall_s - before.wall_s
    asked = 4 * delay(link) + 2 * link.jitter_ms
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


def path(link: Link) -> Link:
    """Two like lines, as one."""
    return link.model_copy(update={"delay_ms": 2 * delay(link), "jitter_ms": 2 * link.jitter_ms})


def delay(link: Link) -> float:
    """One way, ms."""
    assert not isinstance(link.delay_ms, tuple)
    return link.delay_ms


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
    far = line.model_copy(update={"delay_ms": 10.0})
    lossy = far.model_copy(update={"jitter_ms": 2.0, "loss": 0.005})
    cases = {"no delay": line, "10 ms": far, "10 ms, jitter 2 ms, loss 0.5 %": lossy}
    rows = [
        [name, str(streams), *measure(arguments.peers, link, streams, arguments.seconds)]
        for name, link in cases.items()
        for streams in (1, 4)
    ]
    print(f"{arguments.peers} peers, {arguments.mbit:g} Mbit/s up and down each, all sending at once")
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
