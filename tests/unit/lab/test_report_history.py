"""Forks, states that differ, and rounds that got lost, in made-up runs."""

from pathlib import Path

from fake_runs import digest, evidence, long_run, peer, record, sample, strikes

from p2pllm_peers.lab.reporting.report import report

ALL = ("a", "b", "c")


def trio(rounds: range, start_s: float = 0.0) -> dict[str, list[dict]]:
    """Three peers that agree, a round in 2 s."""
    return {name: [record(n, start_s + 2.0 * n, ALL) for n in rounds] for name in ALL}


def on(branch: str, number: int, time_s: float, members: tuple[str, ...]) -> dict:
    """A record of a branch of its own."""
    return record(number, time_s, members, record_digest=digest(number, branch))


def partitioned(tmp_path: Path, planned: dict) -> dict:
    """c goes on alone in rounds 4 and 5, which takes until 10 s, and is with the others again from round 7 on."""
    rows = trio(range(1, 4))
    for name in ("a", "b"):
        rows[name] += [record(n, 2.0 * n, ("a", "b")) for n in range(4, 7)]
    rows["c"] += [on("c", 4, 8.0, ("c",)), on("c", 5, 10.0, ("c",))]
    for name in ALL:
        rows[name] += [record(7, 16.0, ALL), record(8, 18.0, ALL)]
    return report(evidence(tmp_path, rows, **planned))


def test_a_fork_during_a_partition_is_by_design(tmp_path: Path) -> None:
    cut = {"groups": [["a", "b"], ["c"]]}
    found = partitioned(tmp_path, strikes((6.5, "partition", "", cut), (11.0, "heal", "")))
    assert found["abandoned"] == [4, 5] and found["lost"] == found["diverged"] == []
    (branch,) = found["branches"]
    assert branch["kind"] == "fork" and branch["cause"] == 0 and branch["peers"] == ["c"] and branch["rounds"] == [4, 5]
    assert (branch["from_s"], branch["to_s"]) == (8.0, 10.0) and branch["tokens"] == 2 * 4 * 32
    assert branch["rejoined"] == {"c": 7} and branch["rejoined_s"] == 16.0 and branch["repaired"]
    assert found["swarm"]["tokens"] == (5 * 12 + 3 * 8) * 32, "abandoned rounds do not count"
    assert found["swarm"]["abandoned_tokens"] == 2 * 4 * 32
    assert found["rounds"][3]["digests"]["c"] == digest(4, "c")
    assert [row["rounds"] for row in found["peers"]] == [8, 8, 5]


def test_a_fork_that_nothing_explains_is_a_loss(tmp_path: Path) -> None:
    assert partitioned(tmp_path / "1", {})["lost"] == [4, 5]
    mended = strikes((0.5, "cut", "c", {"other": ""}), (1.0, "mend", "c", {"other": ""}))
    assert partitioned(tmp_path / "2", mended)["lost"] == [4, 5], "that cut was over long before"
    other = strikes((6.5, "cut", "a", {"other": ""}), (11.0, "mend", "a", {"other": ""}))
    assert partitioned(tmp_path / "3", other)["abandoned"] == [4, 5], "a is in one of the two rosters only"
    third = strikes((6.5, "cut", "d", {"other": ""}), (11.0, "mend", "d", {"other": ""}))
    assert partitioned(tmp_path / "5", third)["lost"] == [4, 5], "d is in none"
    absent = strikes((6.5, "freeze", "c"), (11.0, "thaw", "c"))
    assert partitioned(tmp_path / "4", absent)["lost"] == [4, 5], "a frozen peer has no business to commit alone"


def test_the_side_of_the_most_peers_is_the_history_even_if_it_is_behind(tmp_path: Path) -> None:
    rows = trio(range(1, 4))
    for name in ("a", "b"):
        rows[name] += [record(4, 8.0, ("a", "b"))]
    rows["c"] += [on("c", n, 2.0 * n, ("c",)) for n in range(4, 9)]
    cut = strikes((6.5, "partition", "", {"groups": [["c"], ["a", "b"]]}))
    found = report(evidence(tmp_path, rows, **cut))
    assert found["swarm"]["rounds"] == 4 and found["abandoned"] == [4, 5, 6, 7, 8]
    assert not found["branches"][0]["repaired"]
    ends = {row["name"]: row for row in found["at_end"]}
    assert ends["c"]["state"] == "cut" and ends["c"]["round"] == 8 and ends["c"]["behind"] == 1
    assert ends["a"]["behind"] == 0


def test_most_of_those_who_are_left_decide_what_the_history_is(tmp_path: Path) -> None:
    rows = trio(range(1, 4))
    for name in ("a", "b"):
        rows[name] += [record(4, 8.0, ("a", "b"))]
    rows["b"] += [record(5, 10.0, ("a", "b"))]
    rows["c"] += [on("c", n, 2.0 * n, ("c",)) for n in range(4, 9)]
    found = report(evidence(tmp_path, rows))
    assert found["swarm"]["rounds"] == 5 and found["lost"] == [4, 5, 6, 7, 8]
    assert {row["name"]: row["behind"] for row in found["at_end"]} == {"a": 1, "b": 0, "c": 2}


def test_a_state_that_differs_and_is_repaired(tmp_path: Path) -> None:
    rows = trio(range(1, 6))
    rows["b"][2]["record_digest"] = digest(3, "flipped")
    found = report(evidence(tmp_path, rows))
    assert found["diverged"] == [3] and found["lost"] == []
    (branch,) = found["branches"]
    assert branch["kind"] == "divergence" and branch["peers"] == ["b"] and branch["repaired"]
    assert branch["rejoined"] == {"b": 4}


def test_a_state_that_differs_for_longer(tmp_path: Path) -> None:
    rows = trio(range(1, 6))
    for number in (2, 3):
        rows["b"][number]["record_digest"] = digest(number + 1, "flipped")
    found = report(evidence(tmp_path, rows))
    assert found["diverged"] == [3, 4] and len(found["branches"]) == 1 and not found["branches"][0]["repaired"]


def test_a_state_that_differs_at_the_end(tmp_path: Path) -> None:
    rows = trio(range(1, 4))
    rows["b"][2]["record_digest"] = digest(3, "flipped")
    assert not report(evidence(tmp_path / "1", rows))["branches"][0]["repaired"]
    back = [sample(50.0, b={"phase": "collecting", "round": 3, "digest": digest(3)})]
    assert report(evidence(tmp_path / "2", rows, samples=back))["branches"][0]["repaired"], "a sample shows it"


def test_a_round_that_only_the_dead_had(tmp_path: Path) -> None:
    """c commits round 4 and dies; the others make another round 4 without it."""
    rows = trio(range(1, 4))
    rows["c"] += [record(4, 8.0, ALL, record_digest=digest(4, "c"))]
    for name in ("a", "b"):
        rows[name] += [record(4, 12.0, ("a", "b")), record(5, 14.0, ("a", "b"))]
    peers = [peer("a"), peer("b"), peer("c", ended_s=[8.1])]
    found = report(evidence(tmp_path, rows, peers=peers, **strikes((8.0, "kill", "c"))))
    assert found["lost"] == [4] and found["swarm"]["rounds"] == 5 and found["branches"][0]["rejoined"] == {"c": None}


def test_the_newest_round_of_the_dead_is_lost_if_nobody_goes_on(tmp_path: Path) -> None:
    rows = trio(range(1, 4))
    rows["c"] += [record(4, 8.0, ALL)]
    peers = [peer("a"), peer("b"), peer("c", ended_s=[8.1])]
    found = report(evidence(tmp_path, rows, peers=peers, **strikes((8.0, "kill", "c"))))
    assert found["lost"] == [4] and found["swarm"]["rounds"] == 3


def test_rounds_that_the_survivors_followed_without_recording_are_not_lost(tmp_path: Path) -> None:
    """a and b make rounds 3 to 5 while c is down; c fetches their state, and goes on alone once they are dead."""
    rows = trio(range(1, 3))
    for name in ("a", "b"):
        rows[name] += [record(n, 2.0 * n, ("a", "b")) for n in (3, 4, 5)]
    rows["c"] += [record(n, 10.0 + 2.0 * n, ("c",)) for n in (6, 7)]
    peers = [peer("a", ended_s=[15.0]), peer("b", ended_s=[15.0]), peer("c", ready_s=[-1, 12.0], ended_s=[4.5, 100.0])]
    found = report(evidence(tmp_path, rows, peers=peers))
    assert found["lost"] == [] and found["branches"] == [] and found["swarm"]["rounds"] == 7
    assert [row["digests"].keys() for row in found["rounds"]][2] == {"a", "b"}


def test_a_sample_that_is_a_moment_old_moves_nobody_back(tmp_path: Path) -> None:
    stale = [sample(6.2, a={"phase": "collecting", "round": 2, "digest": digest(2)})]
    found = report(evidence(tmp_path, {"a": [record(n, 2.0 * n, ["a"]) for n in (1, 2, 3)]}, samples=stale))
    assert found["lost"] == [] and found["at_end"][0]["round"] == 3


def test_the_long_run(tmp_path: Path) -> None:
    found = report(long_run(tmp_path))
    (branch,) = found["branches"]
    assert branch["kind"] == "fork" and branch["peers"] == ["adsl-0", "adsl-1"] and branch["repaired"]
    assert found["events"][branch["cause"]]["do"] == "partition"
    assert found["abandoned"] == branch["rounds"] and found["lost"] == found["diverged"] == []
