"""Pipe: the worker's end of the talk with its daemon, and what it does when that is gone.

What does not live here: what commands and events mean (`worker`), and the daemon's end (`worker_process`).
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from typing import Any, TextIO

Command = dict[str, Any]

_PROGRESS_EVERY_S = 0.5


class Pipe:
    """The worker's end of the talk with the daemon: commands in, events out."""

    def __init__(self, source: TextIO, sink: TextIO, runtime_dir: str) -> None:
        """runtime_dir: the daemon's, to be removed behind it."""
        self._source = source
        self._sink = sink
        self._runtime_dir = runtime_dir
        self._commands: queue.Queue[Command] = queue.Queue()
        self._last_progress = 0.0

    def start(self) -> None:
        """Listen in a thread of its own."""
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self, wait_s: float | None) -> Command | None:
        """The next command; None if none comes within so many seconds. None waits for one."""
        try:
            return self._commands.get(block=wait_s != 0, timeout=wait_s)
        except queue.Empty:
            return None

    def emit(self, event: str, **fields: Any) -> None:
        """Tell the daemon."""
        try:
            self._sink.write(json.dumps({"event": event, **fields}) + "\n")
            self._sink.flush()
        except BrokenPipeError:
            self._end()  # this thread may notice before the listening one

    def tokenising(self, done: int, total: int) -> None:
        """Report progress of a long preparation, not too often."""
        if time.monotonic() - self._last_progress > _PROGRESS_EVERY_S:
            self._last_progress = time.monotonic()
            self.emit("progress", text=f"reading the text: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

    def _listen(self) -> None:
        for line in self._source:
            if line.endswith("\n"):  # else the daemon was killed over it
                self._commands.put(json.loads(line))
        self._end()

    def _end(self) -> None:
        """The daemon is gone, perhaps killed: clean up behind it, whatever the other thread is computing."""
        shutil.rmtree(self._runtime_dir, ignore_errors=True)
        os._exit(0)
