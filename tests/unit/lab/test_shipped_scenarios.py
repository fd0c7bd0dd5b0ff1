"""The scenarios that come with the program: in the wheel, valid in both forms, fit for two cores and for reading."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from p2pllm_peers.lab.reading import SHIPPED
from p2pllm_peers.lab.scenario import fits, load_scenario, shipped
from p2pllm_peers.lab.timeline import timeline

NAMES = [
    "churn",
    "faults",
    "flash-crowd",
    "guests",
    "home-lines",
    "lan",
    "partition",
    "phoenix",
    "slow-lines",
    "stragglers",
]
ROOT = Path(__file__).resolve().parents[3]


def test_all_are_listed_with_what_they_show() -> None:
    listed = shipped()
    assert [name for name, _ in listed] == NAMES
    assert all(about and about == load_scenario(name).about for name, about in listed)


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("name", NAMES)
def test_each_fits_two_cores_and_is_named_as_its_file(name: str, short: bool) -> None:
    scenario = load_scenario(name, short=short)
    assert scenario.name == name
    assert fits(scenario, cpus=2, free_mb=4000) == ""
    budgets = [spec.cores > 0 for spec in scenario.peer_specs()]
    assert all(budgets) or name == "faults", "or waiting peers would speed up the others, which only faults says"
    assert scenario.verdict.min_rounds, "a run that does nothing must not pass"


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_short_form_of_two_minutes_or_so(name: str) -> None:
    whole, short = load_scenario(name), load_scenario(name, short=True)
    assert (
        short.duration_s + short.alone_s <= (150 if name == "faults" else 120) and short.duration_s < whole.duration_s
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_reads_as_documentation(name: str) -> None:
    lines = (SHIPPED / f"{name}.toml").read_text().splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 120 and len(lines) <= 80


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
def test_churn_strikes_several_times_and_in_every_way(short: bool) -> None:
    done = Counter(strike.do for strike in timeline(load_scenario("churn", short=short)))
    assert done["kill"] >= 1 and done["freeze"] >= 1 and done["stop"] >= 1
    assert done["kill"] + done["freeze"] + done["stop"] == (3 if short else 14)


def test_other_seeds_of_the_short_churn_strike_too() -> None:
    for seed in range(50):
        faults = [
            s for s in timeline(load_scenario("churn", short=True, seed=seed)) if s.do in ("kill", "freeze", "stop")
        ]
        assert len(faults) >= 2


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("name", NAMES)
def test_all_that_the_protocol_promises_is_asked_for(name: str, short: bool) -> None:
    verdict = load_scenario(name, short=short).verdict
    assert verdict.nothing_lost and verdict.no_divergence and verdict.agree_at_end and verdict.nothing_left
    assert verdict.max_rounds_behind == 1


def test_faults_meet_the_leader_and_a_member_in_every_phase() -> None:
    planned = [strike for strike in timeline(load_scenario("faults")) if strike.phase]
    assert Counter(strike.do for strike in planned) == {"kill": 8, "freeze": 5, "cut": 5, "slow_link": 2}
    for do in ("kill", "freeze", "cut"):
        assert {strike.phase for strike in planned if strike.do == do} == {
            "collecting", "roster", "exchange", "vote", "commit",
        }  # fmt: skip
    assert {strike.peer for strike in planned} == {"leader", "member"}
    limits = load_scenario("faults", short=True).verdict
    struck = {strike.do for strike in timeline(load_scenario("faults", short=True))}
    assert set(limits.survivors_within_s) | set(limits.returns_within_s) <= struck, "a limit that cannot be judged"


def test_the_wheel_has_them_all(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name.rpartition("/")[2] for name in names if name.startswith("p2pllm_peers/lab/scenarios/")}
    assert packed == {f"{name}.toml" for name in NAMES}
