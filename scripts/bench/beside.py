"""What a peer computes while another program keeps one core busy, and what its threads have to do with it.

    .venv/bin/python scripts/bench/beside.py [--repeats 2]

`p2pllm doctor` measures this machine with the worker's own code, alone and beside an endless loop: with as many threads
as torch takes, which spin for each other as long as OpenMP lets them or as briefly as p2pllm does; with as many as
p2pllm takes; and with one. Ratios are to the first row of a column. Needs OpenMP of GNU, as torch for Linux has it, and
two cores or more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

import torch
from _table import table
from rich.console import Console

from p2pllm_peers.worker_process import ENVIRONMENT

UNLESS_TOLD = "300000"
"""Turns for which GNU's OpenMP spins where nobody says anything (libgomp/env.c)."""

ALL = {"P2PLLM_THREADS": str(torch.get_num_threads())}

WAYS: dict[str, dict[str, str]] = {
    "all threads, OpenMP's spinning": ALL | {"GOMP_SPINCOUNT": UNLESS_TOLD},
    "all threads, brief spinning": ALL | ENVIRONMENT,
    "p2pllm": {},
    "one thread": {"P2PLLM_THREADS": "1"},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    speeds: dict[tuple[str, bool], list[float]] = {}
    with Console(stderr=True).status("measuring") as shown:
        for busy in (False, True):
            for turn in range(repeats):
                for name, variables in WAYS.items():
                    shown.update(f"{name}{', beside a busy program' if busy else ''}, {turn + 1} of {repeats}")
                    speeds.setdefault((name, busy), []).append(speed(variables, busy))
    rows = []
    for name in WAYS:
        alone, beside = (statistics.median(speeds[name, busy]) for busy in (False, True))
        first = [statistics.median(speeds[next(iter(WAYS)), busy]) for busy in (False, True)]
        rows.append([name, f"{alone:,.0f}", f"{alone / first[0]:.2f}", f"{beside:,.0f}", f"{beside / first[1]:.1f}"])
    print(table(["tokens/s", "alone", "ratio", "beside a busy program", "ratio"], rows))


def speed(variables: dict[str, str], busy: bool) -> float:
    """Tokens a second that doctor measures."""
    command = [sys.executable, "-m", "p2pllm_cli.main", "doctor", "--json"]
    with ExitStack() as stack:
        if busy:
            # in a session of its own, as a user's programs are
            loop = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
            )
            stack.callback(loop.kill)
        answer = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, check=True)
    return float(json.loads(answer.stdout)["compute"]["tokens_per_s"])


if __name__ == "__main__":
    main()
