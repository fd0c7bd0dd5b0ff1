"""The lab as its users run it: a shipped scenario in short, every kind of fault, and an end at any moment."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import pytest
from polling import until

from p2pllm.testing.plugin import Lab, LabResult, Machine
from p2pllm_peers.lab import budgets
from p2pllm_peers.lab.cleanup.claims import ledger_folder, sweep
from p2pllm_peers.lab.network import links
from p2pllm_peers.lab.scenario import load_scenario
from p2pllm_peers.lab.timeline import timeline

SCENARIOS = Path(str(resources.files("p2pllm_peers.lab") / "scenarios"))

cannot = links.why_not() or budgets.why_not()
pytestmark = [
    pytest.mark.swarm,
    pytest.mark.alone,
    pytest.mark.timeout(300),
    pytest.mark.skipif(cannot != "", reason=cannot),
]

SMALL = """
name = "small"
duration_s = {duration_s}
alone_s = {alone_s}

[run.model.config]
hidden_size = 32
intermediate_size = 80
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2

[run.data]
context_length = 32
validation_samples = 4
validation_every = 1000

[run.round]
rounds = 1000000
samples = 200
roster_wait_s = 2

[links.line]
up_mbit = 50
down_mbit = 50
delay_ms = 2

[[peers]]
count = {count}
cores = {cores}
link = "line"
disk_mb = {disk_mb}
"""
"""A run whose rounds take a second. It never ends by itself."""

EVERYTHING = """
[links.router]
up_mbit = 50
down_mbit = 50
delay_ms = 2
nat = true

[[peers]]
name = "home"
count = 2
cores = 0.5
link = "router"
disk_mb = 200

[[events]]
at_s = 1
do = "cut"
peer = "peer"
other = "home-1"
for_s = 2

[[events]]
at_s = 4
do = "slow_link"
peer = "home-1"
link = { up_mbit = 5, delay_ms = 30 }
for_s = 2

[[events]]
at_s = 7
do = "slow_machine"
peer = "home-1"
cores = 0.2
for_s = 2

[[events]]
at_s = 10
do = "fill_disk"
peer = "home-1"
for_s = 3

[[events]]
at_s = 14
do = "kill"
peer = "home-0"

[[events]]
at_s = 15
do = "corrupt"
peer = "home-0"
file = "state/*.safetensors"

[[events]]
at_s = 15.2
do = "corrupt"
peer = "home-0"
file = "aggregates/*"

[[events]]
at_s = 15.4
do = "corrupt"
peer = "home-0"
file = "log"

[[events]]
at_s = 16
do = "restart"
peer = "home-0"

[verdict]
min_rounds = 10
"""


TIMED = (
    "links",
    "efficiency",
    "recovery",
    "rounds",
    "validation loss",
    "distance",
    "pace",
    "next commit",
    "stall",
    "return",
)
"""How checks begin that a machine fails from which others took the CPU; such a run says so, and then they count for
nothing. Without CPU budgets it cannot tell, so they never count."""


def passed(result: LabResult) -> None:
    failed = {check["name"] for check in result.report["checks"] if not check["passed"]}
    budgets_ = all(peer["cores"] for peer in result.report["peers"])
    disturbed = not budgets_ or any("times and speeds do not hold" in note for note in result.report["notes"])
    excused = {name for name in failed if name.startswith(TIMED)} if disturbed else set()
    if any("withheld" in note for note in result.report["notes"]) and not result.report["diverged"]:
        # Who got no CPU for seconds was frozen without the lab's knowledge: the others, and it, may have gone on alone.
        excused |= {"no divergence", "nothing lost"}
    assert not failed - excused, result.output[-4000:]
    assert result.code == (1 if failed else 0), result.output[-4000:]
    assert result.report["left_over"] == []


def test_churn(lab: Lab) -> None:
    path = SCENARIOS / "churn.toml"
    result = lab(path, short=True)
    passed(result)
    planned = timeline(load_scenario(str(path), short=True))
    assert result.report["events"] == [strike.model_dump() for strike in planned], "another timeline than the seed's"
    assert len(result.report["recoveries"]) == 3


def test_every_kind_of_fault(lab: Lab) -> None:
    small = SMALL.format(duration_s=42, alone_s=2, count=1, cores=0.5, disk_mb=200) + EVERYTHING
    result = lab(small.replace("hidden_size = 32", "hidden_size = 96"))  # parts of it are more than 128 KiB
    passed(result)
    struck = [result.report["events"][row["event"]]["do"] for row in result.report["struck"]]
    members = max(len(row["members"]) for row in result.report["rounds"])
    assert members == 3, "two peers behind routers never trained together, through the third as their relay"
    assert all(peer["alone_tokens_per_s"] > 0 for peer in result.report["peers"])
    assert result.report["swarm"]["efficiency"] > 0
    assert {"cut", "slow_link", "slow_machine", "fill_disk", "corrupt", "kill", "restart"} <= set(struck)
    assert len(result.report["links"]) == 9, "rate up, rate down and delay of three lines, asked and measured"
    page = (result.out / "report.html").read_text()
    assert "<svg" in page and not re.search(r"""(src|href)=["']?(https?:)?//""", page)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_an_end_at_any_moment_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    machine, output = Machine(tmp_path), tmp_path / "output.txt"
    (tmp_path / "small.toml").write_text(SMALL.format(duration_s=600, alone_s=0, count=1, cores=1.5, disk_mb=50))
    process = machine.start("lab", "run", tmp_path / "small.toml", "--out", tmp_path / "out", output=output)
    try:
        until(lambda: "\nround " in output.read_text() or process.poll() is not None, "a round is shown", 120)
        assert process.poll() is None, output.read_text()
        lab_id = lab_of(process.pid)
        kinds = {line.split()[0] for line in made_by(lab_id)}
        assert kinds == {"ledger", "namespace", "group", "mount", "folder"}
        process.send_signal(number)
        code = process.wait(30)
        until(lambda: not made_by(lab_id) and not machine.processes(), "everything is gone", 20)
    finally:
        process.kill()
        machine.clean()
    if number == signal.SIGINT:
        assert code == 130, output.read_text()
        assert (tmp_path / "out" / "report.json").exists()
        assert (tmp_path / "out" / "peers" / "peer" / "runs").is_dir(), "the files of a disk in memory are kept"


def test_what_a_killed_guard_left_is_removed_by_the_next_lab(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from p2pllm_peers.lab.machines import Machines\n"
        "from p2pllm_peers.lab.scenario import load_scenario\n"
        "with Machines(load_scenario(sys.argv[1]), Path(sys.argv[2])) as machines:\n"
        "    print(machines._claims.id, flush=True)\n"
        "    guard = machines._claims._guard\n"
        "    guard.kill()\n"
        "    guard.wait()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(duration_s=5, alone_s=0, count=2, cores=0.5, disk_mb=0))
    command = [sys.executable, "-c", program, path, tmp_path / "out"]
    lab_id = subprocess.run(command, check=False, timeout=60, stdout=subprocess.PIPE, text=True).stdout.strip()
    assert lab_id and made_by(lab_id)
    assert any(lab_id in line for line in sweep())
    assert made_by(lab_id) == []


def lab_of(owner: int) -> str:
    """The id of the lab that the process `owner` runs."""
    for ledger in ledger_folder().glob("*.jsonl"):
        if json.loads(ledger.read_text().splitlines()[0])["owner"] == owner:
            return ledger.stem
    pytest.fail(f"process {owner} has no ledger")


def made_by(lab_id: str) -> list[str]:
    """What is there of one lab: other labs may run beside it."""
    name = f"p2pllm-{lab_id}"
    mounts = Path("/proc/mounts").read_text().splitlines()
    return [
        *(f"ledger {path}" for path in ledger_folder().glob(f"{lab_id}.jsonl")),
        *(f"namespace {path}" for path in Path("/run/netns").glob(f"{name}*")),
        *(f"group {path}" for path in budgets.ROOT.glob(f"**/{name}")),
        *(f"mount {line.split()[1]}" for line in mounts if line.startswith(name)),
        *(f"folder {path}" for path in Path(tempfile.gettempdir()).glob(f"{name}*")),
    ]
