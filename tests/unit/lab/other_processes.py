"""Other processes, for tests of what becomes of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from p2pllm_peers.lab.cleanup.undo import PATIENCE_S

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@contextlib.contextmanager
def sleeper(*prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that would outlive the test."""
    with subprocess.Popen([*prefix, "sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], bool], within: float = PATIENCE_S) -> bool:
    """It becomes true within some seconds."""
    end = time.monotonic() + within
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
