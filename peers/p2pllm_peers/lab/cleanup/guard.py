"""Waits beside a lab until it has ended, and undoes what it claimed if it ended without doing so, kill -9 included.

    python -m p2pllm_peers.lab.cleanup.guard LEDGER        standard input: a pipe whose other end only the lab holds

The end of the pipe is the lab's death; "done" before it means that the lab has released everything itself. What does
not live here: what is undone and how (`claims`, `undo`).
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def main() -> None:
    """Entry point."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its lab, not before
    if sys.stdin.buffer.readline() == b"done\n":
        return
    from p2pllm_peers.lab.cleanup.claims import (
        release_after_death,
    )  # only now: a lab shall not wait for the imports of its guard

    release_after_death(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
