"""The kit's plugin for pytest: real swarms in the lab, each on a "machine" from which nothing escapes.

    pytest_plugins = ["p2pllm.testing.plugin"]  # in the conftest.py of your test folder

    def test_a_swarm_survives_its_founder(lab):
        result = lab(Path("scenarios/founder.toml"), short=True)
        assert result.code == 0, result.output
        assert result.report["passed"]

What lives here: the fixture `lab`, and `Machine`, which it and other fixtures for real processes are made of. The lab
itself is a program beside this library and is only started, never imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

LIMIT_S = 240.0
"""How long one run of the lab may take, unless the test says otherwise."""

END_S = 20.0
"""How long a lab that was interrupted may take to end its peers and remove its networks."""

SETTLE_S = 5.0
"""How long processes that are about to end may take for it."""

_MARK = "PYTEST_P2PLLM_MACHINE"  # every process inherits it, whoever its parent is by now


class Machine:
    """What a program under test has for itself: folder, home, cache, settings, sockets; and every process of it.

    variables: the environment that gives it all that, without the P2PLLM_ variables of whoever runs the tests.
    """

    def __init__(self, folder: Path) -> None:
        """folder: empty, and kept; only the folder of the sockets is removed by `clean`."""
        self.folder = folder
        # Short, because of the sockets in it; pytest's own folders are too deep on some systems.
        self.runtime = Path(tempfile.mkdtemp(prefix="p2pllm-test-"))
        self.home = folder / "home"
        own = {name: value for name, value in os.environ.items() if not name.startswith("P2PLLM_")}
        self.variables = own | {
            "P2PLLM_HOME": str(self.home),
            "P2PLLM_CACHE": str(folder / "cache"),
            "P2PLLM_CONFIG": str(folder / "config"),
            "XDG_RUNTIME_DIR": str(self.runtime),
            _MARK: str(self.runtime),
        }

    def start(self, *arguments: object, output: Path) -> subprocess.Popen[bytes]:
        """Start `p2pllm ARGUMENTS` in the folder; what it prints goes to the file `output`."""
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "p2pllm_cli.main", *map(str, arguments)],
                env=self.variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[psutil.Process]:
        """Every living process of this machine."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == str(self.runtime) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left_behind(self, within: float = SETTLE_S) -> list[str]:
        """Processes and sockets that are still there after `within` seconds; usually none at once."""
        end = time.monotonic() + within
        while True:
            sockets = self.runtime.rglob("*") if self.runtime.is_dir() else ()
            left = [str(process) for process in self.processes()] + [str(path) for path in sockets]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.05)  # there is nothing that would tell of the end of another's child

    def clean(self) -> None:
        """End what is left and remove the sockets."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
                process.wait(5)
        shutil.rmtree(self.runtime, ignore_errors=True)


@dataclass(frozen=True)
class LabResult:
    """One run of the lab that has ended.

    code: 0 the verdict is passed, 1 it is not, 2 the scenario cannot be used. report: report.json; {} without one.
    output: what the command printed. out: its folder, with lab.json and the peers' own folders.
    """

    code: int
    report: dict[str, Any]
    output: str
    out: Path


class Lab:
    """Runs scenarios with real processes; the fixture `lab` is one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0

    def __call__(
        self, scenario: Path | str, *, short: bool = False, seed: int | None = None, limit_s: float = LIMIT_S
    ) -> LabResult:
        """Run one scenario and return what came of it.

        scenario: a file, or the TOML itself. short: as `--short`. Fails the test if it takes more than `limit_s`
        seconds (mark the test with as much: `pytest.mark.timeout`) or leaves a process or a socket; in any case
        everything that it started has ended then.
        """
        self._runs += 1
        folder = self._folder / f"lab-{self._runs}"
        folder.mkdir()
        path = scenario if isinstance(scenario, Path) else folder / "scenario.toml"
        if isinstance(scenario, str):
            path.write_text(scenario)
        options = ["--short"] * short + ([] if seed is None else ["--seed", str(seed)])
        machine = Machine(folder)
        try:
            return _run(machine, ["lab", "run", path.absolute(), "--out", folder / "out", *options], limit_s)
        finally:
            machine.clean()


def _run(machine: Machine, arguments: list[object], limit_s: float) -> LabResult:
    output, out = machine.folder / "output.txt", machine.folder / "out"
    process = machine.start(*arguments, output=output)
    late = ""
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        late = f"The lab did not end within {limit_s:g} s."
    finally:
        _end(process)
    printed = output.read_text(errors="replace")
    if late or (left := machine.left_behind(SETTLE_S)):
        pytest.fail(f"{late or f'The lab left {left}.'} It printed:\n{printed[-4000:]}", pytrace=False)
    report = out / "report.json"
    return LabResult(process.returncode, json.loads(report.read_bytes()) if report.exists() else {}, printed, out)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it, so that it can remove its networks, and end it if that takes too long."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Run scenarios of the lab with real processes: `lab(scenario, short=False) -> LabResult`."""
    yield Lab(tmp_path)
