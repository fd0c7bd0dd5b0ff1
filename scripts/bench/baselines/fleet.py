"""One baseline's processes, one on each machine: started, let go together, watched, and gone at the end.

What lives here: processes and their rows. What does not: what they do (`solo`, `ddp`, `hivemind_optimizer`), what
follows from their rows (`figures`), and the machines (`p2pllm_peers.lab.machines`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from baselines.messages import Order, Row
from p2pllm.errors import RunError
from p2pllm.manifest import RunDraft
from p2pllm_peers.lab.evidence import read_lines
from p2pllm_peers.lab.machines import Machines

SCRIPTS = Path(__file__).parents[1]
START_S = 180.0
POLL_S = 0.01
_MOUNT = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
LEAVE_S = 5.0
"""For processes to end by themselves when the standard input of the first has closed."""


@dataclass(frozen=True)
class System:
    """A baseline: the module to run, what it is told beside the run, and on how many machines (0: all)."""

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    machines: int = 0


class Fleet:
    """Use as a context: on leaving, every process of it has ended."""

    def __init__(
        self, system: System, machines: Machines, draft: RunDraft, folder: Path, cache: Path, micro_batch: int
    ) -> None:
        """folder: a new one, for rows and logs. Starts nothing yet."""
        self.names = list(machines.specs)[: system.machines or None]
        self._system = system
        self._machines = machines
        self._folder = folder
        self._order: dict[str, Any] = {
            "draft": draft.model_dump(mode="json"),
            "cache": str(cache),
            "micro_batch": micro_batch,
        }
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Fleet:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, progress: Callable[[str], None]) -> None:
        """Start all and wait until each is ready to train. Raises RunError if one ends before that."""
        for rank, name in enumerate(self.names):
            self._start(rank, name)
        first, *others = self.names
        if others:
            contact = self._wait(first, "contact")["contact"]
            for name in others:
                self._tell(name, contact=contact)
        with ThreadPoolExecutor(len(self.names)) as pool:
            waiting = {pool.submit(self._wait, name, "ready"): name for name in self.names}
            try:
                for done in as_completed(waiting, START_S):
                    done.result()
                    progress(f"{waiting[done]}: ready")
            except TimeoutError:
                raise RunError(f"{self._system.module} was not ready on all machines after {START_S:g} s.") from None
            finally:
                if not all(done.done() for done in waiting):
                    self.stop()  # the others may wait for the one that failed for ever

    def go(self, seconds: float) -> None:
        """Let all train from now on, for so long at most: they then end by themselves."""
        for name in self.names:
            self._tell(name, go=seconds)

    def check(self) -> None:
        """Raises RunError if a process has failed."""
        for name, process in self._processes.items():
            if process.poll():
                raise RunError(
                    f"{self._system.module} on {name} ended with code {process.returncode}: {self._why(name)}"
                )

    def rows(self) -> dict[str, list[Row]]:
        """What each peer has recorded so far."""
        return {name: [Row(**row) for row in read_lines(self._folder / f"{name}.jsonl")] for name in self.names}

    def stop(self) -> None:
        """End all processes, whatever state they are in."""
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]  # it was asked for
        end = time.monotonic() + LEAVE_S
        try:
            for name, process in self._processes.items():
                while self._machines.pids(name, process.pid) and time.monotonic() < end:
                    process.poll()
                    time.sleep(POLL_S)
        finally:  # an impatient Ctrl+C, too, leaves nothing behind
            for name, process in self._processes.items():
                self._kill(name, process)
            self._processes.clear()

    def _start(self, rank: int, name: str) -> None:
        machine = self._machines[name]
        rows = str(self._folder / f"{name}.jsonl")
        peers, options = len(self.names), self._system.options
        order = Order(**self._order, rank=rank, peers=peers, host=machine.host, rows=rows, options=options)
        with (self._folder / f"{name}.log").open("w") as log:
            process = self._processes[name] = subprocess.Popen(
                [*machine.prefix, *_own_shared_memory(), sys.executable, "-m", self._system.module],
                cwd=SCRIPTS,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl+C in the terminal is for us, who then end them
                text=True,
            )
        assert process.stdin is not None
        self._tell(name, **asdict(order))

    def _tell(self, name: str, **line: Any) -> None:
        stdin = self._processes[name].stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; whoever waits for it says so
            stdin.write(json.dumps(line) + "\n")
            stdin.flush()

    def _wait(self, name: str, event: str) -> dict[str, Any]:
        """Read what a process says until it says `event`."""
        process = self._processes[name]
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a library that prints
                said: dict[str, Any] = json.loads(line)
                if said["event"] == event:
                    return said
        code = process.wait()
        raise RunError(f"{self._system.module} on {name} ended with code {code} before it was ready: {self._why(name)}")

    def _why(self, name: str) -> str:
        lines = (self._folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing."

    def _kill(self, name: str, process: subprocess.Popen[str]) -> None:
        """End a process and all that it started, those included that its own death left behind."""
        end = time.monotonic() + LEAVE_S
        while (pids := self._machines.pids(name, process.pid)) and time.monotonic() < end:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
            time.sleep(POLL_S)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _own_shared_memory() -> list[str]:
    """Words before a command that give it a /dev/shm which goes with its last process; none where that needs root.

    hivemind puts hundreds of files there, which nobody removes if all its processes are killed at once.
    """
    able = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("unshare")
    return ["unshare", "--mount", "sh", "-c", _MOUNT, "sh"] if able else []
