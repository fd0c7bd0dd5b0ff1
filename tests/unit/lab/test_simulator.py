"""The control-plane simulator: small swarms of the real protocol, the same in every run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from p2pllm.errors import UsageError
from p2pllm_cli.simulate import simulate as command
from p2pllm_peers.lab.simulation.simulator import PEER_SECONDS, Setting, simulate

FIELDS = {
    "peers", "rounds", "churn", "delay_ms", "seed", "virtual_s", "complete", "started", "known", "turned_away",
    "messages", "forming", "training", "first_roster_s", "in_first_rosters", "rounds_committed", "outside_s",
    "rosters_a_round", "notes", "most_branches", "failed_attempts", "left_out", "caught_up", "faults", "by_round",
    "heads", "main_head", "real_s", "cpu_s",
}  # fmt: skip
KINDS = {"beats", "enrol", "roster", "vote", "exchange control", "catching up"}


@pytest.fixture(scope="module")
def thirty() -> dict[str, Any]:
    return simulate(Setting(peers=30, rounds=2))


@pytest.fixture(scope="module")
def churned() -> dict[str, Any]:
    return simulate(Setting(peers=10, rounds=4, churn=3600, seed=8))


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("real_s", "cpu_s")}


def test_thirty_peers_form_and_commit_one_roster_a_round(thirty: dict[str, Any]) -> None:
    assert thirty.keys() == FIELDS
    assert thirty["complete"] and thirty["started"] == 30 and thirty["notes"] == []
    known = thirty["known"]
    assert (known["mean"], known["least"], known["islands"], known["largest_island"]) == (29, 29, 1, 1.0)
    assert 5 <= known["all_known_s"] <= 10  # they arrive within 5 s
    assert thirty["first_roster_s"] > known["all_known_s"] and thirty["in_first_rosters"] == 1.0
    assert [(row["round"], row["peers"], row["rosters"], row["branches"]) for row in thirty["by_round"]] == [
        (1, 30, 1, 1),
        (2, 30, 1, 1),
    ]
    assert (thirty["failed_attempts"], thirty["left_out"], thirty["heads"], thirty["main_head"]) == (0, 0, 1, 1.0)


def test_time_outside_compute_is_a_few_delays(thirty: dict[str, Any]) -> None:
    # enrol, roster, exchange and vote: each one way or both, 20 to 80 ms
    assert 0.1 < thirty["outside_s"] < 1.0
    assert thirty["virtual_s"] < 2 * 15 + 5


def test_messages_a_peer_grow_with_the_swarm(thirty: dict[str, Any]) -> None:
    ten = simulate(Setting(peers=10, rounds=2))["training"]
    many = thirty["training"]
    assert many.keys() == ten.keys() == KINDS
    assert 2 < many["beats"]["messages"] / ten["beats"]["messages"] < 5  # to everybody: 29 against 9
    for kind in ("vote", "exchange control"):
        assert 2 < many[kind]["messages"] / ten[kind]["messages"] < 5
    for kind in ("enrol", "roster"):  # to the leader alone
        assert 0.5 < many[kind]["messages"] / ten[kind]["messages"] < 2
    assert ten["beats"]["bytes"] > ten["beats"]["messages"] * 40 and many["catching up"]["messages"] == 0


def test_churned_peers_return_and_all_end_alike(churned: dict[str, Any]) -> None:
    assert churned["faults"].keys() == {"kill", "freeze", "leave"} and sum(churned["faults"].values()) >= 5
    assert churned["complete"] and churned["known"]["islands"] == 1
    assert churned["rounds_committed"] == 4
    assert (churned["heads"], churned["main_head"]) == (1, 1.0)
    assert churned["caught_up"] > 0 and churned["training"]["catching up"]["messages"] > 0


def test_the_same_seed_gives_the_same_result(churned: dict[str, Any]) -> None:
    again = simulate(Setting(peers=10, rounds=4, churn=3600, seed=8))
    assert timeless(again) == timeless(churned)
    other = simulate(Setting(peers=10, rounds=1, seed=4))
    assert other["first_roster_s"] != churned["first_roster_s"]


def test_longer_delays_take_longer(thirty: dict[str, Any]) -> None:
    slow = simulate(Setting(peers=5, rounds=1, delay_ms=(200, 300)))
    assert slow["outside_s"] > thirty["outside_s"]


def test_the_largest_swarms_are_simulated_for_a_shorter_time() -> None:
    assert Setting(peers=10_000).limit_s == PEER_SECONDS / 10_000 < Setting(peers=100).limit_s


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peers": 0}, "--peers is 0"),
        ({"peers": 3, "rounds": 0}, "--rounds is 0"),
        ({"peers": 3, "churn": -1}, "--churn is -1"),
        ({"peers": 3, "churn": float("nan")}, "--churn is nan"),
        ({"peers": 3, "delay_ms": (80, 20)}, "--delay-ms is 80 20"),
    ],
)
def test_what_cannot_be_simulated_is_one_sentence(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Setting(**fields)


def test_the_command_prints_records_and_writes_every_field(tmp_path: Any) -> None:
    path = tmp_path / "results.json"
    done = CliRunner().invoke(command, ["--peers", "3", "4", "--rounds", "1", "--json", str(path)])
    assert done.exit_code == 0, done.output
    results = json.loads(path.read_text())
    assert [result["peers"] for result in results] == [3, 4]
    assert all(result.keys() == FIELDS | {"memory_mb"} and result["memory_mb"] > 20 for result in results)


def test_sizes_are_said_after_peers() -> None:
    done = CliRunner().invoke(command, ["3", "4"])
    assert isinstance(done.exception, UsageError)
