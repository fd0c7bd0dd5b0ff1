"""What a worker found out is kept in its peer's folder: it makes the next start quicker, and nothing needs it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from p2pllm.errors import StateError
from p2pllm.state import Layout
from p2pllm_peers.micro_batch import Kept

FILE = "worker.json"
"""{"micro_batch": in samples, 0: not looked for; "until": Unix time, 0: for good; "layout": of the model, as JSON}."""


class Remembered:
    """Of one peer. Empty until it is told where; a file that is missing or broken is none."""

    def __init__(self) -> None:
        self._file: Path | None = None

    def stays_in(self, folder: Path) -> None:
        """Where it is from now on."""
        self._file = folder / FILE

    @property
    def micro_batch(self) -> Kept:
        """As it was found for the device, or halved for want of memory."""
        size, until = (self._read().get(name, 0) for name in ("micro_batch", "until"))
        if isinstance(size, int) and size > 0 and isinstance(until, (int, float)):
            return Kept(size, until)
        return Kept()

    @property
    def layout(self) -> Layout | None:
        """Of the model's parameters, as it was built here before; None if it never was."""
        with contextlib.suppress(StateError):
            return Layout.from_json(str(self._read().get("layout")))
        return None

    def keep(self, layout: Layout, micro_batch: Kept) -> None:
        """For the next start. A disk that does not take it costs that start some seconds."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                size, until = micro_batch
                self._file.write_text(json.dumps({"micro_batch": size, "until": until, "layout": layout.to_json()}))

    def _read(self) -> dict[str, Any]:
        found: Any = None
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._file.read_text()) if self._file is not None else None
        return found if isinstance(found, dict) else {}
