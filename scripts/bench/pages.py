"""What open pages cost a peer: `p2pllm dashboard` with no reader, and with twenty, in turns.

    .venv/bin/python scripts/bench/pages.py [--readers 20] [--turns 4] [--seconds 30]

Two peers train the default model on loopback, one thread each; beside the founder runs the dashboard, and in every
other turn a program that follows the events of so many pages, as browsers do. Processor time is each program's own, in
percent of one core; the readers' is no cost of a peer but of whoever looks, and takes from the founder's speed where
they sit at the same machine and its cores are all at work. Ratios are to the turns without a reader.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from _table import table
from aiohttp import ClientSession, CookieJar, TCPConnector
from rich.console import Console

from p2pllm.manifest import RunDraft
from p2pllm.settings import load_settings
from p2pllm_peers.lab.swarm import SwarmPeer, swarm_on_loopback

WARM_S = 5.0
"""Time that readers get to open their pages before a turn counts."""

WHAT = ("founder, tokens/s", "daemon, % of a core", "worker, % of a core", "dashboard, % of a core")

Turn = tuple[float, ...]
"""What WHAT says, of one turn."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=20)
    parser.add_argument("--turns", type=int, default=4, help="of each kind")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a turn")
    parser.add_argument("--read", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        asyncio.run(read(given.read, given.readers))
        return
    found = measured(given.readers, given.turns, given.seconds)
    without, with_ = ([statistics.median(values) for values in zip(*found[readers], strict=True)] for readers in found)
    rows = [
        [name, f"{before:,.1f}", f"{after:,.1f}", f"{after / before:.3f}" if before else "-"]
        for name, before, after in zip(WHAT, without, with_, strict=True)
    ]
    print(table([f"median of {given.turns} turns", "0 readers", f"{given.readers} readers", "ratio"], rows))


def measured(readers: int, turns: int, seconds: float) -> dict[int, list[Turn]]:
    """Turns by number of readers."""
    draft = RunDraft().model_copy(update={"round": RunDraft().round.model_copy(update={"rounds": 10**6})})
    found: dict[int, list[Turn]] = {0: [], readers: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        Console(stderr=True).status("starting") as shown,
        swarm_on_loopback(draft, 2, Path(folder) / "out", load_settings()) as swarm,
    ):
        swarm.start(list(swarm.peers), shown.update)
        founder = next(iter(swarm.peers.values()))
        with dashboard(founder.machine.home) as (page, url):
            for turn in range(2 * turns):
                count = (0, readers)[turn % 2]
                shown.update(f"{count} readers, turn {turn // 2 + 1} of {turns}")
                with reading(url, count):
                    time.sleep(WARM_S)
                    found[count].append(measure(founder, page, seconds))
    return found


def measure(founder: SwarmPeer, page: psutil.Process, seconds: float) -> Turn:
    """One turn."""
    daemon = psutil.Process(founder.process.pid)
    worker = max(daemon.children(recursive=True), key=busy)
    programs = (daemon, worker, page)
    begin, tokens, before = time.monotonic(), founder.status()["tokens"], [busy(program) for program in programs]
    time.sleep(seconds)
    tokens, after = founder.status()["tokens"] - tokens, [busy(program) for program in programs]
    took = time.monotonic() - begin
    return tokens / took, *(100 * (end - start) / took for start, end in zip(before, after, strict=True))


def busy(program: psutil.Process) -> float:
    """Processor seconds of a program so far."""
    times = program.cpu_times()
    return times.user + times.system


@contextlib.contextmanager
def dashboard(home: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The page of the peers in `home`, and its address."""
    command = [sys.executable, "-u", "-m", "p2pllm_cli.main", "dashboard", "--no-open", "--home", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.search(r"http://\S+", process.stdout.readline())
            if url is None:
                raise SystemExit("The dashboard has not started; what it says of that is above.")
            yield psutil.Process(process.pid), url[0]
        finally:
            process.terminate()


@contextlib.contextmanager
def reading(url: str, count: int) -> Iterator[None]:
    """So many open pages, if any."""
    if not count:
        yield
        return
    with subprocess.Popen([sys.executable, __file__, "--read", url, "--readers", str(count)]) as process:
        try:
            yield
            if process.poll() is not None:
                raise SystemExit("The readers have ended by themselves; why is above.")
        finally:
            process.terminate()


async def read(url: str, count: int) -> None:
    """Open the address once, then follow the events of `count` pages for good."""
    origin = url.partition("/?")[0]
    async with ClientSession(cookie_jar=CookieJar(unsafe=True), connector=TCPConnector(limit=0)) as session:
        await (await session.get(url)).read()
        await asyncio.gather(*(follow(session, origin) for _ in range(count)))


async def follow(session: ClientSession, origin: str) -> None:
    """As one page: what it begins with, and then its events."""
    begin = await session.get(f"{origin}/api/start")
    begin.raise_for_status()
    await begin.read()
    async with session.get(f"{origin}/api/events", timeout=None) as events:
        events.raise_for_status()
        async for _ in events.content.iter_any():
            pass
    raise SystemExit("The dashboard has closed a page.")


if __name__ == "__main__":
    main()
