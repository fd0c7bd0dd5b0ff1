"""A good guest: pauses, limits and what this machine keeps, with real daemons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from polling import until

from p2pllm_peers.folders import RunFolder

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]

WATCHED_S = 10.0
"""How long a limit is watched; the lab's scenario `guests` does it for minutes."""


class Pair:
    """A founder and a volunteer of one machine, in the background."""

    def __init__(self, env: Any) -> None:
        self.env = env
        started = self.run("start", env.write_run(("samples = 8", "samples = 400")), "--detach")
        invite = next(word for word in started.split() if word.startswith("p2pllm:"))
        self.run("join", invite, "--detach")
        until(lambda: len(self.last_members()) == 2, "two peers train together")

    def run(self, *arguments: object) -> str:
        """What a command prints; it must succeed."""
        result = self.env.p2pllm(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def statuses(self) -> dict[str, dict[str, Any]]:
        lines = self.env.p2pllm_here("status", "--json").stdout.splitlines()
        return {status["name"]: status for status in map(json.loads, lines)}

    def last_members(self) -> dict[str, int]:
        """Of the founder's newest round: samples by peer id."""
        (path,) = self.env.home.glob("runs/*/founder/rounds.jsonl")
        lines = path.read_text().splitlines()
        return json.loads(lines[-1])["members"] if lines else {}

    def processes(self, name: str) -> list[psutil.Process]:
        """Daemon, worker and p2pd of a peer."""
        (facts,) = self.env.home.glob(f"runs/*/{name}/daemon.json")
        daemon = psutil.Process(json.loads(facts.read_text())["pid"])
        return [daemon, *daemon.children(recursive=True)]

    def cores(self, name: str, seconds: float) -> float:
        """Cores that a peer takes on average."""

        def taken() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in self.processes(name))

        before, began = taken(), time.monotonic()
        time.sleep(seconds)  # the span that is measured
        return (taken() - before) / (time.monotonic() - began)

    def eagerness(self, name: str, seconds: float) -> float:
        """Share of the time in which a peer's worker computes or waits for a processor that other programs have."""
        worker = next(one for one in self.processes(name) if "p2pllm_peers.worker" in one.cmdline())

        def wanted_s() -> float:
            computed, waited, _ = Path(f"/proc/{worker.pid}/schedstat").read_text().split()
            return (int(computed) + int(waited)) * 1e-9

        before, began = wanted_s(), time.monotonic()
        time.sleep(seconds)  # the span that is measured
        return (wanted_s() - before) / (time.monotonic() - began)


@pytest.fixture(scope="module")
def pair(make_peer_env: Callable[[], Any]) -> Pair:
    return Pair(make_peer_env())


def test_a_pause_frees_the_machine_and_delays_nobody(pair: Pair) -> None:
    own = pair.statuses()["volunteer"]["peer_id"]
    assert "for 1h" in pair.run("pause", "--name", "volunteer", "--for", "1h")
    paused = until(lambda: (found := pair.statuses())["volunteer"]["phase"] == "paused" and found, "it pauses")
    assert paused["volunteer"]["paused"].startswith("until ")
    assert pair.cores("volunteer", 3) < 0.1
    begin = pair.statuses()["founder"]["round"]
    now = until(lambda: (found := pair.statuses())["founder"]["round"] > begin + 3 and found, "the other one goes on")
    assert [(peer["peer"], peer["phase"]) for peer in now["founder"]["peers"]] == [(own, "paused")]
    assert own not in pair.last_members()
    pair.run("resume", "--name", "volunteer")
    until(lambda: own in pair.last_members(), "it contributes again")


def test_without_a_name_all_peers_of_the_machine_pause(pair: Pair) -> None:
    for command, phase in (("pause", True), ("resume", False)):
        said = pair.run(command)
        assert "'founder'" in said and "'volunteer'" in said
        until(lambda phase=phase: {bool(one["paused"]) for one in pair.statuses().values()} == {phase}, command)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux tells who waits for a processor")
def test_the_limit_of_processor_time_is_held(pair: Pair) -> None:
    percent = 100 * 0.4 / (os.cpu_count() or 1)
    printed = pair.run("set", f"cpu_percent={percent}")
    assert printed.count("goes by it now") == 2
    pair.cores("volunteer", 6)  # it takes a while to find out what a step costs
    taken = [pair.cores(name, WATCHED_S) for name in ("founder", "volunteer")]
    assert 0.1 < sum(taken) < 0.48, "less than 0.4 is what a busy machine leaves them"
    assert max(taken) < 0.24, "each has its part"
    pair.run("set", "cpu_percent=100")
    until(lambda: pair.eagerness("volunteer", 3) > 0.7, "it computes freely again")


def test_the_priority_of_a_worker_changes_while_it_computes(pair: Pair) -> None:
    def niceness() -> set[int]:
        return {max(process.nice() for process in pair.processes(name)) for name in ("founder", "volunteer")}

    least = max(10, psutil.Process().nice())
    until(lambda: niceness() == {least}, "the workers stand back")
    higher = min(19, least + 4)
    assert pair.run("set", f"nice={higher}").count("goes by it now") == 2
    assert niceness() == {higher}
    shown = pair.run("set", "nice=10")
    assert niceness() == ({higher} if "next start" in shown else {least})


def test_a_daemon_is_small(pair: Pair) -> None:
    for name in ("founder", "volunteer"):
        daemon, *children = pair.processes(name)
        p2pd = next(child for child in children if child.name().startswith("p2pd"))
        assert daemon.memory_info().rss + p2pd.memory_info().rss < 350e6
        assert not any("torch" in mapped.path for mapped in daemon.memory_maps())


def test_a_bare_join_goes_on_as_before_and_hears_what_is_said_while_it_starts(pair: Pair) -> None:
    pair.run("leave", "--name", "volunteer")
    pair.run("join", "--name", "volunteer", "--detach", "--disk", "3", "--upload", "900")
    pair.run("leave", "--name", "volunteer")
    (manifest,) = pair.env.home.glob("runs/*/manifest.json")
    volunteer = RunFolder(pair.env.home, manifest.parent.name).peer("volunteer")
    with subprocess.Popen(
        [sys.executable, "-m", "p2pllm_cli.main", "join", "--name", "volunteer", "--detach"],
        env=pair.env.variables,
        cwd=pair.env.folder,
        stdout=subprocess.DEVNULL,
    ) as join:
        until(lambda: volunteer.running() == {}, "it starts")
        shown = pair.run("set", "duty_percent=80", "upload_mbit=800")
        assert "'volunteer'" in shown and "is still starting" in shown and "upload_mbit = 900.0, which holds" in shown
        pair.run("pause", "--name", "volunteer", "--for", "3d")
        assert join.wait(60) == 0
    now = until(lambda: (found := pair.statuses()["volunteer"])["phase"] == "paused" and found, "it pauses")
    assert now["limits"] == {"disk_gb": 3.0, "duty_percent": 80.0, "upload_mbit": 800.0}
    pair.run("resume", "--name", "volunteer")
    pair.run("set", "duty_percent=100", "upload_mbit=0")


def test_a_peer_that_is_starting_leaves(pair: Pair) -> None:
    pair.run("leave", "--name", "volunteer")
    (manifest,) = pair.env.home.glob("runs/*/manifest.json")
    volunteer = RunFolder(pair.env.home, manifest.parent.name).peer("volunteer")
    with subprocess.Popen(
        [sys.executable, "-m", "p2pllm_cli.main", "join", "--name", "volunteer"],
        env=pair.env.variables,
        cwd=pair.env.folder,
        stdout=subprocess.DEVNULL,
    ) as join:
        until(lambda: volunteer.starting_pid() and volunteer.running() == {}, "it starts")
        pair.run("leave", "--name", "volunteer")
        assert join.wait(30) == 130
    pair.run("join", "--name", "volunteer", "--detach")


def test_runs_and_clean(pair: Pair) -> None:
    rows = [json.loads(line) for line in pair.run("runs", "--json").splitlines()]
    assert {(row["peer"], row["state"]) for row in rows if "peer" in row} == {
        ("founder", "running"), ("volunteer", "running"),
    }  # fmt: skip
    refused = pair.env.p2pllm("clean", "--run", rows[0]["run_id"][:8], "--yes")
    assert refused.returncode == 1 and "leave" in refused.stderr
    assert "nothing to free" in pair.run("clean", "--yes")
    for name in ("founder", "volunteer"):
        pair.run("leave", "--name", name)
    assert "Freed" in pair.run("clean", "--run", rows[0]["run_id"][:8], "--yes")
    assert not list(pair.env.home.glob("runs/*"))
