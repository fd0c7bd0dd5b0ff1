"""What a daemon says: events to the program that started it, and its log.

What does not live here: the answers to commands (`control`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger("p2pllm.daemon")


def tell(event: str, **fields: Any) -> None:
    """Report to the program that started us; it may be gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()


def tell_progress(text: str) -> None:
    """Report and log a step of the start."""
    log.info("%s", text)
    tell("progress", text=text)


def log_into(path: Path) -> None:
    """Log to a file, what libraries write to standard error included."""
    file = path.open("a", encoding="utf-8", buffering=1)
    os.dup2(file.fileno(), sys.stderr.fileno())
    logging.basicConfig(
        stream=file, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def silence() -> None:
    """Let go of the launcher's pipe: whoever reads it may end before us."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, not a path
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
