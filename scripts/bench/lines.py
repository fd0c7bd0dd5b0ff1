"""How much of a line bulk fills: chunks fetched from one peer, and dense all-reduces; real nodes, shaped lines, root.

    .venv/bin/python scripts/bench/lines.py [--mbit 100] [--seconds 8] [--values 50] [--congestion bbr reno]

"fetch": one node fetches chunks from another as a joiner does, or as many at once as --at-once says, each on a stream
of its own; before the clock starts it has asked which there are, as a joiner has. The share of the rate is the payload
that came within the seconds: the first ones, with the start of all streams but one, and then as often again in the same
fetch as --spans says. A rate counts whole packets, so 95.6 % is all that TCP can do. "all-reduce": so many million
values as fp32; the share is the physical limit, 2 (N - 1) / N x bytes by rate, by the time that it took. A line is of
no use as a measure if the emulator was late by more than a few milliseconds. --congestion: TCP's, of those that the
kernel allows in namespaces (net.ipv4.tcp_allowed_congestion_control); reno and cubic lose nearly everything where one
packet in 200 is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
from _table import table

from p2pllm.averaging import DenseAllReduce, Group
from p2pllm.identity import Identity
from p2pllm.network.bulk import Blob, BulkServer, Fetches
from p2pllm.network.node import Node, NodeSettings
from p2pllm.rounds.download import Download
from p2pllm.state import CHUNK_BYTES
from p2pllm_peers.lab.cleanup.claims import Claims
from p2pllm_peers.lab.network import links
from p2pllm_peers.lab.network.checking import answer, program
from p2pllm_peers.lab.scenario import Link

RUN = "b0" * 32
REDUCE_LIMIT_S = 120.0
ENDLESS = 10_000  # pieces
PLAN_BYTES = 8_000  # what names 250 of them
FETCHES = {"20 ms": (20.0, 0.0), "150 ms": (150.0, 0.0), "50 ms, 0.5 % loss": (50.0, 0.005)}
REDUCES = {"2 peers, 20 ms": (2, 20.0), "2 peers, 150 ms": (2, 150.0), "4 peers, 20 ms": (4, 20.0)}
"""Round trip in ms, and loss or peers."""


# -- in the namespaces ------------------------------------------------------------------------------------------------


async def play(name: str, host: str, congestion: str, folder: Path) -> None:
    """One node, which takes orders as JSON lines."""
    net = Path("/proc/sys/net/ipv4")
    (net / "tcp_congestion_control").write_text(congestion)
    (net / "tcp_no_metrics_save").write_text("1")  # no case shall learn from the one before
    identity = Identity.load_or_create(folder / f"{name}.key")
    node = await Node.start(identity, RUN, folder / name, NodeSettings(listen_host=host))
    engine = DenseAllReduce(node)

    async def source(request: dict[str, Any]) -> Blob:
        return Blob({}, [bytes(PLAN_BYTES if request else CHUNK_BYTES)])

    try:
        await BulkServer(node, source).start()
        await engine.start()
        _say({"peer": node.peer_id, "address": node.addresses()[0]})
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            match order.pop("do"):
                case "know":
                    for peer, address in order["others"]:
                        node.learn(peer, [address])
                    _say({})
                case "fetch":
                    _say({"bytes": await _fetch(node, **order)})
                case "reduce":
                    _say({"seconds": await _reduce(engine, **order)})
                case "end":
                    break
    finally:
        await node.stop()


async def _fetch(node: Node, peer: str, at_once: int, seconds: float, spans: int) -> list[int]:
    """Bytes that came within so many seconds, one span after the other. at_once: 0 does what a joiner does."""

    fetches = Fetches(node)

    async def one(source: str, piece: int) -> bool:
        return await fetches.fetch(source, {}, CHUNK_BYTES) is not None

    async def work() -> None:
        while True:
            await one(peer, 0)

    await fetches.fetch(peer, {"what": "plan"}, CHUNK_BYTES)
    came = [node.traffic.received]
    works = [work() for _ in range(at_once)] or [Download(range(ENDLESS), [peer], one).run()]
    tasks = [asyncio.create_task(each) for each in works]
    for _ in range(spans):
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        came.append(node.traffic.received)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
    return [after - before for before, after in itertools.pairwise(came)]


async def _reduce(engine: DenseAllReduce, members: list[str], number: int, values: int) -> float:
    """Seconds of one all-reduce."""
    group = Group(number.to_bytes(32, "big"), tuple(members), (1.0,) * len(members), values, "fp32")
    vector = np.ones(values, np.float32)
    began = time.monotonic()
    result = await engine.run(group, vector, REDUCE_LIMIT_S)
    assert result.aggregate is not None, result.reason
    return time.monotonic() - began


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


# -- outside ----------------------------------------------------------------------------------------------------------


@dataclass
class Nodes:
    """Nodes on lines of their own, all of which know each other."""

    star: links.Links
    processes: dict[str, Popen[bytes]]
    peers: dict[str, str]

    def tell(self, name: str, do: str, **order: Any) -> None:
        """Give an order."""
        pipe = self.processes[name].stdin
        assert pipe is not None
        pipe.write(json.dumps({"do": do, **order}).encode() + b"\n")
        pipe.flush()

    def hear(self, name: str) -> dict[str, Any]:
        """Its answer."""
        heard: dict[str, Any] = json.loads(answer(self.processes[name], name))
        return heard


@contextlib.contextmanager
def nodes(lines: dict[str, Link], congestion: str) -> Iterator[Nodes]:
    """A node on each of these lines."""
    with Claims.open() as claims, contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        star = links.Links(claims, lines, seed=1)
        star.start()
        stack.callback(star.stop)
        made = Nodes(star, {}, {})
        for name in lines:
            words = [sys.executable, __file__, "--play", name, star.address(name), congestion, folder]
            made.processes[name] = stack.enter_context(program([*star.prefix(name), *words]))
        where = {name: made.hear(name) for name in lines}
        made.peers = {name: each["peer"] for name, each in where.items()}
        for name in lines:
            others = [(each["peer"], each["address"]) for other, each in where.items() if other != name]
            made.tell(name, "know", others=others)
            made.hear(name)
        yield made
        for name, process in made.processes.items():
            made.tell(name, "end")
            process.wait(10)


def fetches(mbit: float, seconds: float, spans: int, at_once: list[int], congestion: str) -> Iterator[list[str]]:
    """Rows: a line, a number of chunks at once and a span each."""
    for label, (trip_ms, loss) in FETCHES.items():
        line = Link(up_mbit=mbit, down_mbit=mbit, delay_ms=trip_ms / 4)
        with nodes({"donor": line.model_copy(update={"loss": loss}), "joiner": line}, congestion) as made:
            for count in at_once:
                order = {"peer": made.peers["donor"], "at_once": count, "seconds": seconds, "spans": spans}
                made.tell("joiner", "fetch", **order)
                came = made.hear("joiner")["bytes"]
                late = f"{made.star.emulator().late_p99_ms:.1f}"
                for span, size in enumerate(came):
                    what = f"fetch, {count or 'as many as a joiner'} at once, from {span * seconds:g} s"
                    yield [what, label, congestion, f"{size * 8e-6 / seconds / mbit:.0%}", late]


def reduces(mbit: float, values: int, repeats: int, congestion: str) -> Iterator[list[str]]:
    """Rows: a number of peers and a round trip each; the median of the repeats."""
    for label, (count, trip_ms) in REDUCES.items():
        line = Link(up_mbit=mbit, down_mbit=mbit, delay_ms=trip_ms / 4)
        names = [f"peer-{number}" for number in range(count)]
        with nodes(dict.fromkeys(names, line), congestion) as made:
            took = []
            for number in range(1 + repeats):  # the first one connects
                for name in names:
                    made.tell(name, "reduce", members=list(made.peers.values()), number=number, values=values)
                took.append(max(made.hear(name)["seconds"] for name in names))
            median = sorted(took[1:])[repeats // 2]
            limit = 2 * (count - 1) / count * 4 * values * 8e-6 / mbit
            late = f"{made.star.emulator().late_p99_ms:.1f}"
            yield [f"all-reduce, {median:.2f} s", label, congestion, f"{limit / median:.0%}", late]


def main() -> None:
    """Measure all and print a table."""
    if sys.argv[1:2] == ["--play"]:
        name, host, congestion, folder = sys.argv[2:]
        asyncio.run(play(name, host, congestion, Path(folder)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each span of a fetch")
    parser.add_argument("--spans", type=int, default=2, help="of each fetch")
    parser.add_argument("--values", type=float, default=50.0, help="millions, of each all-reduce")
    parser.add_argument("--repeats", type=int, default=3, help="of each all-reduce")
    usual = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    parser.add_argument("--congestion", nargs="+", default=[usual])
    parser.add_argument("--at-once", type=int, nargs="+", default=[0], help="chunks; 0: as a joiner does")
    options = parser.parse_args()
    if reason := links.why_not():
        sys.exit(f"{reason}.")
    rows = []
    jobs: list[Callable[[str], Iterator[list[str]]]] = [
        lambda congestion: fetches(options.mbit, options.seconds, options.spans, options.at_once, congestion),
        lambda congestion: reduces(options.mbit, int(options.values * 1e6), options.repeats, congestion),
    ]
    for congestion in options.congestion:
        for job in jobs:
            for row in job(congestion):
                print(*row, sep=", ", file=sys.stderr, flush=True)
                rows.append(row)
    print(table(["what", "line", "TCP", "share of the line", "emulator late, p99 ms"], rows))


if __name__ == "__main__":
    main()
