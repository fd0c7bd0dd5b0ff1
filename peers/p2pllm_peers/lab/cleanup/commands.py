"""Running the short commands that make what a lab claims, so that its guard waits for them.

A command like `ip` goes on when the lab that started it is killed, and may make something only then. So it holds the
pipes to the guards of this process, as the lab itself does: a guard hears the end of its pipe when all who held it
have ended. What does not live here: programs that run as long as the lab does, which must not hold it (`subprocess`
sees to that), and guards (`claims`, `guard`).
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from typing import IO

_pipes: list[IO[bytes]] = []
_lock = threading.Lock()


def run(arguments: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command with `text` as its input, and wait for its end; one at a time in this process. Raises OSError."""
    with _lock:
        ends = [pipe.fileno() for pipe in _pipes]
        return subprocess.run(
            arguments, input=text, capture_output=True, text=True, pass_fds=ends, env={**os.environ, "PATH": _path()}
        )


def _path() -> str:
    """Where to look for commands: `tc` and `bridge` lie where the PATH of a user or of a service may not go."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def hold(pipe: IO[bytes]) -> None:
    """Every command from now on holds this pipe."""
    with _lock:
        _pipes.append(pipe)


def hang_up(pipe: IO[bytes]) -> None:
    """Close a pipe that was held. A command that Ctrl+C has made us forget still holds it until it ends."""
    with _lock:
        _pipes.remove(pipe)
        pipe.close()
