"""What a daemon says: events to the program that started it, and its log.

What does not live here: the answers to commands (`control`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

log = logging.getLogger("p2pllm.daemon")

LOG_BYTES, KEPT_LOGS = 5_000_000, 3
"""Size of a log, and how many older ones are kept."""


def tell(event: str, **fields: Any) -> None:
    """Report to the program that started us; it may be gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()


def tell_progress(text: str) -> None:
    """Report and log a step of the start."""
    log.info("%s", text)
    tell("progress", text=text)


class _LogFile(RotatingFileHandler):
    """A log of bounded size, with what libraries write to standard error."""

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.dup2(stream.fileno(), sys.stderr.fileno())
        return stream


def log_into(path: Path) -> None:
    """Log to a file; when it is full it is kept as path.1, and so on."""
    handler = _LogFile(path, maxBytes=LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8")
    logging.basicConfig(
        handlers=[handler], level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def silence() -> None:
    """Let go of the launcher's pipe: whoever reads it may end before us."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, not a path
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
