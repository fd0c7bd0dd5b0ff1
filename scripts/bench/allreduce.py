"""How long one dense all-reduce takes: ours, hivemind's averager, gloo; real processes on loopback.

Every number is the time from a common start until the last peer holds the mean; the group is known before, so
matchmaking is not counted. Systems take turns within each repeat. The ratios compare medians of this run.

    python scripts/bench/allreduce.py [--sizes 10 50] [--peers 2 4] [--repeats 3] [--profile]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from _allreduce import SYSTEMS, peer_main
from _table import table

STARTUP_SECONDS = 180
RUN_SECONDS = 300


class Fleet:
    """The processes of one system."""

    def __init__(self, system: str, peers: int, shared: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.system = system
        self.pipes: list[Connection] = []
        self.processes = []
        self.known: set[psutil.Process] = set()
        self.sockets: set[Path] = set()
        for index in range(peers):
            ours, theirs = context.Pipe()
            process = context.Process(target=peer_main, args=(system, index, peers, str(shared), theirs))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def collect(self, timeout: float) -> list[Any]:
        """One answer of each peer."""
        until = time.monotonic() + timeout
        for pipe in self.pipes:
            if not pipe.poll(max(until - time.monotonic(), 0)):
                raise RuntimeError(f"a peer of {self.system} does not answer")
        answers = [pipe.recv() for pipe in self.pipes]
        self.remember()
        return answers

    def tell(self, *command: Any, timeout: float = RUN_SECONDS) -> list[Any]:
        """Give all peers a command; one answer of each."""
        for pipe in self.pipes:
            pipe.send(command)
        return self.collect(timeout)

    def remember(self) -> None:
        """Note all processes, however deep, and their sockets, while their parents still live."""
        for process in self.processes:
            with contextlib.suppress(psutil.Error, ValueError, TypeError):
                parent = psutil.Process(process.pid)
                self.known |= {parent, *parent.children(recursive=True)}
        self.sockets |= {path for process in self.known for path in _sockets(process)}

    def cpu(self) -> tuple[float, float]:
        """CPU seconds so far: of Python, of p2pd."""
        totals = {True: 0.0, False: 0.0}
        for process in self.known:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                totals[process.name().startswith("p2pd")] += times.user + times.system
        return totals[False], totals[True]

    def stop(self, orderly: bool) -> None:
        """End the processes, by id, and remove the sockets that they leave in /tmp."""
        self.remember()
        if orderly:
            with contextlib.suppress(RuntimeError, OSError, EOFError):
                self.tell("end", timeout=15)
                for process in self.processes:
                    process.join(5)
        for victim in self.known:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        psutil.wait_procs(self.known, timeout=5)
        for path in self.sockets:
            path.unlink(missing_ok=True)


def _sockets(process: psutil.Process) -> list[Path]:
    with contextlib.suppress(psutil.Error):
        addresses = [str(connection.laddr) for connection in process.net_connections(kind="unix")]
        return [Path(address) for address in addresses if address.startswith("/tmp/hivemind-")]  # noqa: S108
    return []


@contextlib.contextmanager
def fleets(systems: list[str], peers: int) -> Iterator[dict[str, Fleet]]:
    """Start all systems one after another, and leave nothing of them behind."""
    running: dict[str, Fleet] = {}
    orderly = False
    with tempfile.TemporaryDirectory(prefix="bench-allreduce-", ignore_cleanup_errors=True) as shared:
        try:
            for system in systems:
                running[system] = Fleet(system, peers, Path(shared))
                running[system].collect(STARTUP_SECONDS)
            yield running
            orderly = True
        finally:
            for fleet in running.values():
                fleet.stop(orderly)


class Measured:
    """What was measured of one system in one configuration."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.python: list[float] = []
        self.p2pd: list[float] = []
        self.shares: list[dict[str, float]] = []

    def median(self, name: str) -> float:
        """Of `seconds`, `python` or `p2pd`, over the repeats."""
        return float(statistics.median(getattr(self, name)))


def measure(running: dict[str, Fleet], size: int, codec: str, repeats: int) -> dict[str, Measured]:
    """Prepare all systems, run them in turns (the first turn warms up and does not count), release them."""
    taking_part = {name: fleet for name, fleet in running.items() if name != "gloo" or codec == "fp32"}
    measured = {name: Measured() for name in taking_part}
    for fleet in taking_part.values():
        fleet.tell("prepare", size, codec)
    for turn in range(repeats + 1):
        for name, fleet in taking_part.items():
            fleet.tell("arm", time.time_ns())
            before = fleet.cpu()
            answers = fleet.tell("go", time.monotonic() + 0.1)
            after = fleet.cpu()
            if turn:
                measured[name].seconds.append(max(answer["seconds"] for answer in answers))
                measured[name].python.append(after[0] - before[0])
                measured[name].p2pd.append(after[1] - before[1])
                measured[name].shares += answers
    for fleet in taking_part.values():
        fleet.tell("release")
    return measured


def rows_of(label: str, codec: str, measured: dict[str, Measured], gloo: float | None) -> list[list[str]]:
    """One row a system: seconds, ratios, CPU seconds."""
    base = measured["hivemind"].median("seconds") if "hivemind" in measured else None
    rows = []
    for name, each in measured.items():
        seconds = each.median("seconds")
        rows.append(
            [
                label,
                name if name == "gloo" else f"{name} {codec}",
                f"{seconds:.3f}",
                f"{min(each.seconds):.3f}-{max(each.seconds):.3f}",
                f"{seconds / base:.2f}" if base else "",
                f"{seconds / gloo:.1f}" if gloo else "",
                f"{each.median('python'):.2f}",
                f"{each.median('p2pd'):.2f}",
            ]
        )
    return rows


def profile_of(label: str, codec: str, each: Measured) -> list[str]:
    """Where our time goes, mean over peers and repeats, seconds a peer."""
    wanted = ("total", "connect", "encode", "decode", "reduce")
    cells = [f"{statistics.fmean(share[name] for share in each.shares):.3f}" for name in wanted]
    return [label, codec, *cells, f"{each.median('python'):.2f}", f"{each.median('p2pd'):.2f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[10, 50], help="millions of float32 values")
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--codecs", nargs="+", default=["fp32", "fp16"], choices=["fp32", "fp16"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also say where our time goes")
    options = parser.parse_args()
    rows, profiles = [], []
    for peers in options.peers:
        with fleets(options.systems, peers) as running:
            for size in options.sizes:
                gloo = None
                for codec in options.codecs:
                    measured = measure(running, int(size * 1e6), codec, options.repeats)
                    label = f"{peers} x {size:g} M"
                    gloo = measured["gloo"].median("seconds") if "gloo" in measured else gloo
                    rows += rows_of(label, codec, measured, gloo)
                    if "ours" in measured:
                        profiles.append(profile_of(label, codec, measured["ours"]))
                    print(f"measured {label} {codec}", flush=True)
    head = ["peers x values", "system", "median s", "range s", "/ hivemind", "/ gloo", "CPU s Python", "CPU s p2pd"]
    print("\n" + table(head, rows))
    if options.profile:
        head = ["ours", "codec", "total s", "connect", "encode", "decode", "reduce", "CPU s Python", "CPU s p2pd"]
        print("\n" + table(head, profiles))


if __name__ == "__main__":
    main()
