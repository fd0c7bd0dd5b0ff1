"""Waits beside a lab until it has ended or has finished, and undoes what it claimed; kill -9 makes no difference.

    python -m p2pllm_peers.lab.cleanup.guard LEDGER        standard input: a pipe that the lab and its commands hold

The end of the pipe says that nobody is left who could make something. What does not live here: who holds the pipe
(`commands`), what is undone and how (`claims`, `undo`).
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def main() -> None:
    """Entry point."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends after its lab, not before
    from p2pllm_peers.lab.cleanup.claims import release  # only now, for it takes time, in which a signal would end us

    sys.stdin.buffer.read()
    release(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
