"""Faults: how long the others and the victims took, and what state each peer was in, in made-up runs."""

from pathlib import Path

import pytest
from fake_runs import digest, evidence, peer, record, sample, strikes

from p2pllm_peers.lab.evidence import Strike, Struck
from p2pllm_peers.lab.reporting.report import report


def story(tmp_path: Path, planned: dict, gap: tuple[float, float], back_s: float | None = None, **fields) -> dict:
    """a commits every 2 s but in the gap; b does with it until the gap begins, and again from `back_s` on."""
    times = [2.0 * n for n in range(1, 45) if not gap[0] < 2.0 * n < gap[1]]
    rows = {"a": [], "b": []}
    for number, time_s in enumerate(times, 1):
        there = time_s <= gap[0] or (back_s is not None and time_s >= back_s)
        for name in ("a", "b") if there else ("a",):
            rows[name].append(record(number, time_s, ("a", "b") if there else ("a",)))
    return report(evidence(tmp_path, rows, **planned, **fields))


def states(found: dict, name: str) -> list[tuple[str, float]]:
    """What a peer was, and from when on."""
    return [(state["state"], state["from_s"]) for state in found["timeline"][name]]


def test_a_kill_and_a_restart(tmp_path: Path) -> None:
    planned = strikes((20.5, "kill", "b"), (30.0, "restart", "b", {"keep_disk": True}))
    peers = [peer("a"), peer("b", ready_s=[-1.0, 37.0], ended_s=[20.6, 100.0])]
    found = story(tmp_path, planned, (20.0, 26.0), 40.0, peers=peers)
    (row,) = found["recoveries"]
    assert (row["event"], row["do"], row["victims"], row["at_s"], row["undone_s"]) == (0, "kill", ["b"], 20.5, 30.0)
    assert row["survivors_s"] == pytest.approx(5.5) and row["survivors_round"] == 11
    assert row["return_s"] == pytest.approx(10.0) and row["return_round"] == 18
    assert row["watched_s"] == pytest.approx(78.5)
    assert states(found, "b") == [("up", -1.0), ("down", 20.6), ("starting", 30.0), ("up", 37.0)]
    assert found["timeline"]["a"] == [{"state": "up", "from_s": -1.0, "to_s": 99.0}]


def test_a_restart_that_waits_until_the_peer_has_left(tmp_path: Path) -> None:
    planned = strikes((20.5, "stop", "b"), (22.0, "restart", "b", {"keep_disk": True}))
    peers = [peer("a"), peer("b", ready_s=[-1.0, 37.0], ended_s=[24.0, 100.0])]
    found = story(tmp_path, planned, (20.0, 20.0), 40.0, peers=peers)
    assert states(found, "b") == [("up", -1.0), ("starting", 24.0), ("up", 37.0)]
    assert found["recoveries"][0]["undone_s"] == 24.0 and found["recoveries"][0]["return_s"] == pytest.approx(16.0)
    peers[1].ready_s, peers[1].ended_s = [-1.0], [99.5]
    found = story(tmp_path, planned, (20.0, 20.0), peers=peers)
    assert found["recoveries"][0]["undone_s"] is None, "it left only after the end"


def test_a_peer_that_is_stopped_and_restarted_before_it_was_ready(tmp_path: Path) -> None:
    planned = strikes(
        (20.5, "kill", "b"), (22.0, "restart", "b", {"keep_disk": True}),
        (27.9, "stop", "b"), (27.95, "restart", "b", {"keep_disk": True}),
    )  # fmt: skip
    peers = [peer("a"), peer("b", ready_s=[-1.0, 28.0, 50.0], ended_s=[20.6, 35.0, 100.0])]
    found = story(tmp_path, planned, (20.0, 20.0), 52.0, peers=peers)
    assert states(found, "b")[1:] == [
        ("down", 20.6), ("starting", 22.0), ("up", 28.0), ("starting", 35.0), ("up", 50.0)
    ]  # fmt: skip


def test_a_peer_that_is_killed_while_it_starts(tmp_path: Path) -> None:
    again = {"keep_disk": True}
    planned = strikes(
        (20.5, "kill", "b"), (25.0, "restart", "b", again), (28.0, "kill", "b"), (35.0, "restart", "b", again)
    )
    peers = [peer("a"), peer("b", ready_s=[-1.0, 45.0], ended_s=[20.6, 28.1, 100.0])]
    found = story(tmp_path, planned, (20.0, 20.0), 46.0, peers=peers)
    assert states(found, "b")[1:] == [
        ("down", 20.6), ("starting", 25.0), ("down", 28.1), ("starting", 35.0), ("up", 45.0)
    ]  # fmt: skip


def test_a_peer_that_is_killed_while_it_is_frozen(tmp_path: Path) -> None:
    planned = strikes((20.5, "freeze", "b"), (24.0, "kill", "b"), (30.0, "restart", "b", {"keep_disk": True}))
    peers = [peer("a"), peer("b", ready_s=[-1.0, 37.0], ended_s=[24.1, 100.0])]
    found = story(tmp_path, planned, (20.0, 20.0), 40.0, peers=peers)
    assert [row["undone_s"] for row in found["recoveries"]] == [24.0, 30.0]
    assert states(found, "b")[1:] == [("frozen", 20.5), ("up", 24.0), ("down", 24.1), ("starting", 30.0), ("up", 37.0)]
    assert {end["name"]: end["state"] for end in found["at_end"]} == {"a": "up", "b": "up"}


def test_a_victim_that_never_comes_back(tmp_path: Path) -> None:
    peers = [peer("a"), peer("b", ended_s=[20.6])]
    found = story(tmp_path, strikes((20.5, "kill", "b")), (20.0, 26.0), peers=peers)
    (row,) = found["recoveries"]
    assert row["return_s"] is None and row["return_round"] is None and row["undone_s"] is None
    assert {end["name"]: end["state"] for end in found["at_end"]} == {"a": "up", "b": "down"}


def test_the_round_that_was_just_committed_is_no_recovery(tmp_path: Path) -> None:
    """b recorded round 10 before the fault, c a moment after it."""
    names = ("a", "b", "c")
    rows = {name: [record(10, 20.0, names)] for name in names}
    rows["c"] = [record(10, 20.2, names), record(11, 27.0, names[1:])]
    found = report(evidence(tmp_path, rows, **strikes((20.1, "kill", "a"))))
    assert found["recoveries"][0]["survivors_s"] == pytest.approx(6.9)


def test_a_freeze_and_a_cut_at_once(tmp_path: Path) -> None:
    cut = {"other": ""}
    planned = strikes(
        (20.5, "freeze", "b"), (22.0, "cut", "b", cut), (30.0, "thaw", "b"), (32.0, "mend", "b", cut)
    )  # fmt: skip
    found = story(tmp_path, planned, (20.0, 26.0), 40.0)
    freeze, cut_off = found["recoveries"]
    assert freeze["return_s"] == pytest.approx(10.0) and cut_off["return_s"] == pytest.approx(8.0)
    assert states(found, "b") == [("up", -1.0), ("frozen", 20.5), ("cut", 30.0), ("up", 32.0)]


def test_a_pause(tmp_path: Path) -> None:
    found = story(tmp_path, strikes((20.5, "pause", "b"), (30.0, "resume", "b")), (20.0, 26.0), 34.0)
    (row,) = found["recoveries"]
    assert row["away"] and row["undone_s"] == 30.0 and row["return_s"] == pytest.approx(4.0)
    assert states(found, "b") == [("up", -1.0), ("paused", 20.5), ("up", 30.0)]


def test_a_slow_machine_is_never_away(tmp_path: Path) -> None:
    planned = strikes((20.5, "slow_machine", "b", {"cores": 0.1}), (30.0, "slow_machine", "b", {"cores": 0.0}))
    found = story(tmp_path, planned, (20.0, 26.0), 34.0)
    (row,) = found["recoveries"]
    assert row["undone_s"] == 30.0 and not row["away"]
    assert row["return_s"] == pytest.approx(13.5), "from the fault, as it was never gone"
    assert len(found["timeline"]["b"]) == 1


def test_a_partition_is_over_when_the_last_is_back(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    rows = {name: [record(1, 2.0, names)] for name in names}
    for name in ("a", "b"):
        rows[name] += [record(2, 15.0, ("a", "b")), record(3, 32.0, ("a", "b"))]
    rows["c"] += [record(2, 31.0, ["c"], record_digest=digest(2, "c"))]
    for name in names:
        rows[name] += [record(4, 36.0, names)]
    late = peer("late", ready_s=[80.0])
    groups = {"groups": [["c"], ["a", "b", "late"]]}
    planned = strikes((10.0, "partition", "", groups), (30.0, "heal", ""), (75.0, "join", "late"))
    peers = [*map(peer, names), late]
    found = report(evidence(tmp_path, rows, peers=peers, **planned))
    (row,) = found["recoveries"]
    assert row["victims"] == ["a", "b", "c"], "who was not there yet is no victim"
    assert row["survivors_s"] == pytest.approx(5.0) and row["survivors_round"] == 2
    assert row["return_s"] == pytest.approx(6.0) and row["return_round"] == 4
    assert [state["state"] for state in found["timeline"]["c"]] == ["up", "cut", "up"]
    assert [state["state"] for state in found["timeline"]["a"]] == ["up"]
    assert [state["state"] for state in found["timeline"]["late"]] == ["starting", "up"]


def test_an_event_that_failed_is_no_fault(tmp_path: Path) -> None:
    planned = strikes((20.5, "kill", "b"))
    planned["struck"][0].error = "no such process"
    assert story(tmp_path, planned, (20.0, 20.0))["recoveries"] == []


def test_after_the_last_round_of_the_run_nothing_is_waited_for(tmp_path: Path) -> None:
    rows = {name: [record(n, 2.0 * n) for n in (1, 2, 3)] for name in ("a", "b")}
    scenario = {"run": {"round": {"rounds": 3}}}
    found = report(evidence(tmp_path, rows, scenario=scenario, **strikes((5.0, "freeze", "b"), (7.0, "kill", "b"))))
    assert found["swarm"]["completed"]
    assert [row["watched_s"] for row in found["recoveries"]] == [pytest.approx(1.0), 0.0]


@pytest.mark.parametrize(("thawed", "settling"), [(60.0, False), (80.0, True)])
def test_distance_from_the_head(tmp_path: Path, thawed: float, settling: bool) -> None:
    planned = strikes((20.5, "freeze", "b"), (thawed, "thaw", "b"))
    samples = [sample(98.0, b={"phase": "joining", "round": 30, "digest": digest(30)})]
    found = story(tmp_path, planned, (20.0, 20.0), samples=samples)
    behind = {row["name"]: (row["behind"], row["settling"]) for row in found["at_end"]}
    assert behind == {"a": (0, False), "b": (14, settling)}


def test_who_commits_without_being_a_member_is_not_back(tmp_path: Path) -> None:
    planned = strikes((20.5, "kill", "b"), (30.0, "restart", "b", {"keep_disk": True}))
    peers = [peer("a"), peer("b", ready_s=[-1.0, 37.0], ended_s=[20.6, 100.0])]
    rows = {name: [record(n, 2.0 * n) for n in range(1, 11)] for name in ("a", "b")}
    for number, members in ((11, ("a",)), (12, ("a", "b"))):
        for name in ("a", "b"):
            rows[name].append(record(number, 40.0 + 2.0 * (number - 11), members))
    (row,) = report(evidence(tmp_path, rows, peers=peers, **planned))["recoveries"]
    assert row["return_round"] == 12 and row["return_s"] == pytest.approx(12.0)


def test_a_fault_in_a_phase_with_its_victim_and_what_undid_it(tmp_path: Path) -> None:
    events = [
        Strike(at_s=5.0, do="slow_machine", peer="leader", args={"cores": 0.1}, phase="exchange"),
        Strike(at_s=9.0, do="slow_machine", peer="leader", undoes=0),
        Strike(at_s=5.0, do="kill", peer="member", phase="vote"),
        Strike(at_s=8.0, do="restart", peer="member", args={"keep_disk": True}, undoes=2),
    ]
    struck = [
        Struck(event=0, at_s=10.5, peer="a", phase="exchange", round=5, age_s=0.01),
        Struck(event=1, at_s=14.5, peer="a"),
        Struck(event=2, at_s=20.5, peer="b", phase="vote", round=10, age_s=0.03),
        Struck(event=3, at_s=30.0, peer="b"),
    ]
    peers = [peer("a"), peer("b", ready_s=[-1.0, 37.0], ended_s=[20.6, 100.0])]
    scenario = {"duration_s": 99, "peers": [{"name": "a"}, {"name": "b"}]}
    found = story(tmp_path, {"events": events, "struck": struck}, (20.0, 26.0), 40.0, peers=peers, scenario=scenario)
    slow, kill = found["recoveries"]
    assert (slow["do"], slow["victims"], slow["undone_s"]) == ("slow_machine", ["a"], 14.5)
    assert (kill["victims"], kill["phase"], kill["round"], kill["age_s"]) == (["b"], "vote", 10, 0.03)
    assert kill["undone_s"] == 30.0 and kill["return_s"] == pytest.approx(10.0)
    assert states(found, "b")[1:] == [("down", 20.6), ("starting", 30.0), ("up", 37.0)]


def test_how_long_a_round_takes_that_no_fault_touched(tmp_path: Path) -> None:
    """Rounds take 2 s until 20 s, 6 s and 3 s while b is away, and 2.5 s from its return at 40 s on."""
    early, away, late = [2.0 * n for n in range(1, 11)], [26.0, 29.0, 32.0, 35.0], [40.0, 42.5, 45.0]
    rows = {"a": [], "b": []}
    for number, time_s in enumerate(early + away + late, 1):
        members = ("a",) if time_s in away else ("a", "b")
        for name in members:
            rows[name].append(record(number, time_s, members))
    planned = strikes((20.5, "freeze", "b"), (36.0, "thaw", "b"))
    found = report(evidence(tmp_path / "1", rows, **planned))
    assert found["swarm"]["calm_round_s"] == 2.0, "nine of 2 s and two of 2.5 s"
    assert found["recoveries"][0]["delay_s"] == pytest.approx(26.0 - 20.5 - 2.0)
    assert found["swarm"]["share_up"] == pytest.approx(1 - 15.5 / 99 / 2)
    assert found["swarm"]["pace"] == pytest.approx((9 * 2.0 + 2 * 2.5) / 11 * 16 / 43)
    never = report(evidence(tmp_path / "2", rows, **strikes((1.0, "freeze", "b"), (46.0, "thaw", "b"))))
    assert never["swarm"]["calm_round_s"] is None and never["swarm"]["pace"] is None
    assert never["recoveries"][0]["delay_s"] is None


def test_a_fault_for_good_touches_rounds_until_the_others_go_on(tmp_path: Path) -> None:
    found = story(tmp_path, strikes((20.5, "kill", "b")), (20.0, 26.0), peers=[peer("a"), peer("b", ended_s=[20.6])])
    assert found["swarm"]["calm_round_s"] == 2.0
