"""A run of the lab that is ended before its swarm has begun."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from other_processes import until

from p2pllm.testing.plugin import Machine
from p2pllm_peers.lab import budgets
from p2pllm_peers.lab.cleanup.claims import ledger_folder
from p2pllm_peers.lab.cleanup.undo import Claim, still_there
from p2pllm_peers.lab.network import links

cannot = links.why_not() or budgets.why_not()

SCENARIO = """
duration_s = 600
links.home = {up_mbit = 5, down_mbit = 20, delay_ms = 20}
peers = [{count = 2, cores = 0.5, link = "home", disk_mb = 5}]
"""


def rows(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()]


def ledger_of(owner: int) -> Path:
    """The ledger of the lab that the process `owner` runs; others come and go beside it."""
    for path in ledger_folder().glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError, IndexError):
            if rows(path)[0]["owner"] == owner:
                return path
    pytest.fail(f"process {owner} has no ledger")


@pytest.mark.swarm
@pytest.mark.skipif(cannot != "", reason=cannot)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_an_end_while_the_lines_are_measured_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    machine, output = Machine(tmp_path), tmp_path / "output.txt"
    (tmp_path / "small.toml").write_text(SCENARIO)
    process = machine.start("lab", "run", tmp_path / "small.toml", "--out", tmp_path / "out", output=output)
    try:
        assert until(lambda: "measuring the lines" in output.read_text(), within=30)
        ledger = ledger_of(process.pid)
        made = [Claim(**row) for row in rows(ledger)[1:]]
        assert {claim.kind for claim in made if still_there(claim)} == {"folder", "namespace", "cgroup", "mount"}
        process.send_signal(number)
        assert process.wait(20) == (130 if number == signal.SIGINT else -signal.SIGKILL)
        assert until(lambda: not ledger.exists() and not machine.processes(), within=15)
        assert [line for claim in made for line in still_there(claim)] == []
    finally:
        process.kill()
        process.wait()
        machine.clean()
    if number == signal.SIGINT:
        assert "Traceback" not in output.read_text()
        assert json.loads((tmp_path / "out" / "lab.json").read_bytes())["interrupted"]
