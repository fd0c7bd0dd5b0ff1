"""The verdict over reports of made-up runs: what holds, what does not, and what cannot be told."""

from pathlib import Path
from typing import Any

import pytest
from fake_runs import PARTS, digest, evidence, long_run, peer, record, strikes

from p2pllm_peers.lab.evidence import Evidence, LinkCheck
from p2pllm_peers.lab.reporting.report import report
from p2pllm_peers.lab.reporting.verdict import Check, judge
from p2pllm_peers.lab.scenario import Verdict

NOTHING = Verdict(
    no_divergence=False, agree_at_end=False, nothing_lost=False, nothing_left=False, max_rounds_behind=None
)


def check(made: Evidence, **limits: Any) -> Check:
    """The one check that `limits` asks for."""
    checks = judge(report(made), NOTHING.model_copy(update=limits))
    assert [row.name for row in checks[:3]] == ["links", "events carried out", "crashes"]
    (found,) = checks[3:]
    return found


def good(tmp_path: Path, **facts: Any) -> Evidence:
    """Two peers that agree on twenty rounds of 2 s."""
    rows = [record(n, 2.0 * n, validation_loss=3.0) for n in range(1, 21)]
    return evidence(tmp_path, {"a": rows, "b": rows}, **facts)


def test_a_good_run_passes_the_usual_checks(tmp_path: Path) -> None:
    checks = judge(report(good(tmp_path)), Verdict())
    assert [row.passed for row in checks] == [True] * 8
    assert [row.name for row in checks] == [
        "links", "events carried out", "crashes", "no divergence", "agreement at the end", "nothing lost",
        "distance from the head", "nothing left",
    ]  # fmt: skip


def test_lines_other_than_asked_for_are_no_scenario(tmp_path: Path) -> None:
    line = {"asked_up_mbit": 20, "asked_down_mbit": 100, "asked_delay_ms": 30}
    fine = LinkCheck(peer="a", measured_up_mbit=19.2, measured_down_mbit=104, measured_delay_ms=31.9, **line)
    slow = LinkCheck(peer="b", measured_up_mbit=18.9, measured_down_mbit=100, measured_delay_ms=30, **line)
    (tmp_path / "fine").mkdir()
    (tmp_path / "slow").mkdir()
    assert judge(report(good(tmp_path / "fine", links=[fine])), NOTHING)[0].measured == "3 of 3"
    found = judge(report(good(tmp_path / "slow", links=[fine, slow])), NOTHING)[0]
    assert not found.passed
    assert found.measured == "1 of 6 differ, first b up 18.9 for 20 Mbit/s"


def test_a_run_without_rounds_passes_none_of_what_it_was_for(tmp_path: Path) -> None:
    made = evidence(tmp_path, {"a": [], "b": []})
    limits = Verdict(max_validation_loss=9.0, min_rounds=1, min_efficiency=0.0, max_recovery_s=1e6)
    failed = {row.name: row for row in judge(report(made), limits) if not row.passed}
    assert failed.keys() == {
        "no divergence", "agreement at the end", "nothing lost", "distance from the head", "rounds",
        "validation loss", "efficiency", "recovery",
    }  # fmt: skip
    assert failed["no divergence"].measured == "no round was committed"


@pytest.mark.parametrize(
    ("limits", "passed", "words"),
    [
        ({"min_rounds": 20}, True, "20"),
        ({"min_rounds": 21}, False, "20"),
        ({"max_validation_loss": 3.0}, True, "3.0000 nats"),
        ({"max_validation_loss": 2.9}, False, "3.0000 nats"),
        ({"nothing_left": True}, True, "nothing"),
        ({"nothing_lost": True}, True, "none of 20 rounds"),
        ({"no_divergence": True}, True, "equal in 20 of 20"),
        ({"max_recovery_s": 5.0}, False, "no fault was struck"),
        ({"min_efficiency": 0.5}, False, "not measured: the scenario has no alone_s"),
        ({"max_rounds_behind": 0}, True, "all are at the head"),
        ({"agree_at_end": True}, True, "2 peers agree"),
    ],
)
def test_limits(tmp_path: Path, limits: dict, passed: bool, words: str) -> None:
    found = check(good(tmp_path), **limits)
    assert found.passed == passed and words in found.measured, found


@pytest.mark.parametrize(
    ("alone", "passed", "words"), [(100.0, True, "64.0%"), (150.0, False, "42.7%"), (20.0, False, "measured wrong")]
)
def test_efficiency(tmp_path: Path, alone: float, passed: bool, words: str) -> None:
    peers = [peer(name, alone_tokens_per_s=alone) for name in ("a", "b")]
    made = good(tmp_path, peers=peers, scenario={"alone_s": 5})
    found = check(made, min_efficiency=0.5)
    assert found.passed == passed and words in found.measured, found


def test_what_was_left_over(tmp_path: Path) -> None:
    found = check(good(tmp_path / "1", left_over=["process 7 (p2pd)"]), nothing_left=True)
    assert not found.passed and found.measured == "process 7 (p2pd)"
    assert not check(good(tmp_path / "2", ended_s=0.0), nothing_left=True).passed, "nobody looked"


def test_crashes_and_failed_events_are_always_told(tmp_path: Path) -> None:
    planned = strikes((5.0, "fill_disk", "b"), (6.0, "free_disk", "b"))
    planned["struck"][0].error = "b has no disk of its own"
    made = good(tmp_path, peers=[peer("a", crashes=["no memory"]), peer("b")], **planned)
    _, events, crashes = judge(report(made), NOTHING)
    assert not events.passed and "1 of 2 failed, first fill disk b at 5 s: b has no disk" in events.measured
    assert not crashes.passed and crashes.measured == "1, first a: no memory"


def test_divergence(tmp_path: Path) -> None:
    rows = {name: [record(n, 2.0 * n) for n in range(1, 6)] for name in ("a", "b", "c")}
    rows["c"][1]["record_digest"] = digest(2, "flipped")
    found = check(evidence(tmp_path / "1", rows), no_divergence=True)
    assert found.passed and "equal in 4 of 5 shared rounds; divergence of c at round 2 (repaired)" in found.measured
    rows["c"][2]["record_digest"] = digest(3, "flipped")
    found = check(evidence(tmp_path / "2", rows), no_divergence=True)
    assert not found.passed and "divergence of c at rounds 2-3 (not repaired)" in found.measured


def test_nobody_to_compare_with(tmp_path: Path) -> None:
    alone = {"a": [record(1, 2.0, ["a"])]}
    assert check(evidence(tmp_path / "1", alone), no_divergence=True).passed, "there is but one peer"
    found = check(evidence(tmp_path / "2", alone | {"b": []}), no_divergence=True)
    assert not found.passed and "nothing to compare" in found.measured


def test_a_fork_without_a_cut_is_lost_and_diverged(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    rows = {name: [record(1, 2.0, names), record(2, 4.0, ("a", "b"))] for name in ("a", "b")}
    rows["c"] = [record(1, 2.0, names), record(2, 4.0, ["c"], record_digest=digest(2, "c"))]
    lost = check(evidence(tmp_path / "1", rows), nothing_lost=True)
    assert not lost.passed and lost.measured == "lost: round 2"
    assert not check(evidence(tmp_path / "2", rows), no_divergence=True).passed
    split = check(evidence(tmp_path / "3", rows), agree_at_end=True)
    assert not split.passed and split.measured == "round 2: a, b / c"
    cut = strikes((3.0, "cut", "c", {"other": ""}), (9.0, "mend", "c", {"other": ""}))
    allowed = check(evidence(tmp_path / "4", rows, **cut), nothing_lost=True)
    assert allowed.passed and "1 round abandoned after a cut" in allowed.measured
    stuck = check(evidence(tmp_path / "5", rows, **cut), no_divergence=True)
    assert not stuck.passed, "the cut was over long ago, and c did not come back"


def test_rounds_of_a_longer_branch_are_not_counted_as_shared(tmp_path: Path) -> None:
    rows = {name: [record(1, 2.0, ("a", "b", "c")), record(2, 4.0, ("a", "b"))] for name in ("a", "b")}
    alone = [record(n, 2.0 * n, ["c"], record_digest=digest(n, "c")) for n in range(2, 7)]
    cut = strikes((3.0, "cut", "c", {"other": ""}))
    found = check(
        evidence(tmp_path, rows | {"c": [record(1, 2.0, ("a", "b", "c")), *alone]}, **cut), no_divergence=True
    )
    assert found.passed and found.measured.startswith("equal in 1 of 2 shared rounds; fork of c at rounds 2-6")


def test_distance_from_the_head(tmp_path: Path) -> None:
    rows = {"a": [record(n, 2.0 * n) for n in (1, 2, 3)], "b": [record(1, 2.0)]}
    assert check(evidence(tmp_path / "1", rows), max_rounds_behind=2).passed
    found = check(evidence(tmp_path / "2", rows), max_rounds_behind=1)
    assert not found.passed and found.measured == "b is 2 rounds behind"
    frozen = evidence(tmp_path / "3", rows, **strikes((3.0, "freeze", "b")))
    found = check(frozen, max_rounds_behind=1)
    assert found.passed and found.measured == "all are at the head; not counted: b"


def test_recovery(tmp_path: Path) -> None:
    rows = {"a": [record(1, 2.0), record(2, 10.0, ["a"])], "b": [record(1, 2.0)]}
    planned = strikes((4.0, "freeze", "b"))
    assert check(evidence(tmp_path / "1", rows, **planned), max_recovery_s=6.0).passed
    found = check(evidence(tmp_path / "2", rows, **planned), max_recovery_s=5.9)
    assert not found.passed and found.measured == "6.0 s at most, after freeze b at 4 s; 1 fault"
    never = strikes((4.0, "freeze", "b"), (50.0, "kill", "b"))
    found = check(evidence(tmp_path / "3", rows, **never), max_recovery_s=8.0)
    assert not found.passed and found.measured == "never after kill b at 50 s"
    late = strikes((4.0, "freeze", "b"), (95.0, "kill", "b"))
    assert check(evidence(tmp_path / "4", rows, **late), max_recovery_s=8.0).passed, "it ended too soon to tell"
    only = strikes((95.0, "kill", "b"))
    assert not check(evidence(tmp_path / "5", rows, **only), max_recovery_s=8.0).passed


def test_next_commit_and_return_by_kind_of_fault(tmp_path: Path) -> None:
    """Rounds of 2 s; the next commit comes 6 s after the freeze, 4 s late; b is a member 3 s after the thaw."""
    both = [record(n, 2.0 * n) for n in range(1, 6)]
    after = [record(6, 16.0, ["a"]), *(record(n, 2.0 * n + 7.0) for n in range(7, 11))]
    rows = {"a": [*both, *after], "b": [*both, *after[1:]]}
    planned = strikes((10.0, "freeze", "b"), (18.0, "thaw", "b"))
    made = evidence(tmp_path / "1", rows, **planned)
    found = check(made, survivors_within_s={"freeze": 4.0})
    assert found.passed and found.name == "next commit after freeze"
    assert found.measured == "4.0 s at most beyond 2.0 s, after freeze b at 10 s; 1 fault"
    assert not check(made, survivors_within_s={"freeze": 3.9}).passed
    assert check(made, survivors_within_s={"kill": 9.0}).measured == "no such fault was struck"
    assert check(made, returns_within_s={"freeze": 3.0}).passed
    late = check(made, returns_within_s={"freeze": 2.9})
    assert not late.passed and late.measured == "3.0 s at most, after freeze b at 10 s; 1 fault"
    lone = evidence(tmp_path / "2", {"a": rows["a"], "b": both}, **planned)
    never = check(lone, returns_within_s={"freeze": 60.0})
    assert not never.passed and never.measured == "never after freeze b at 10 s"
    kept_away = evidence(tmp_path / "3", rows, **strikes((10.0, "freeze", "b")))
    assert check(kept_away, returns_within_s={"freeze": 60.0}).measured == "nobody came back"
    dead = evidence(tmp_path / "4", {"a": both, "b": both}, **strikes((10.5, "kill", "b")))
    found = check(dead, survivors_within_s={"kill": 9.0})
    assert not found.passed and found.measured == "never after kill b at 10 s"


def test_a_stall_is_what_the_next_rounds_took_beside_computing(tmp_path: Path) -> None:
    """A round takes 0.4 s beside computing; the one after the freeze half a second more, the next one a second."""
    rows = {"a": [record(n, 2.0 * n) for n in range(1, 6)], "b": [record(n, 2.0 * n) for n in range(1, 6)]}
    for number, more in ((6, 0.5), (7, 1.0), (8, 3.0)):
        seconds = PARTS | {"compute": 9.0, "vote": PARTS["vote"] + more}
        rows["a"].append(record(number, 2.0 * number + 9.0, ["a"], seconds=seconds))
    made = evidence(tmp_path, rows, **strikes((10.5, "freeze", "b")))
    found = check(made, stalls_within_s={"freeze": 1.0001})
    assert found.passed and found.measured == "1.0 s at most, after freeze b at 10 s; 1 fault"
    assert not check(made, stalls_within_s={"freeze": 0.99}).passed
    assert not check(made, stalls_within_s={"kill": 9.0}).passed


def test_pace(tmp_path: Path) -> None:
    """Of ten rounds of 2 s one takes 4 s; b is gone for 10 of 99 s."""
    times = [*range(2, 20, 2), 22.0]
    rows = {name: [record(n, float(t)) for n, t in enumerate(times, 1)] for name in ("a", "b")}
    made = evidence(tmp_path / "1", rows, **strikes((18.5, "freeze", "b"), (28.5, "thaw", "b")))
    found = check(made, min_pace=0.9)
    assert found.passed and found.measured == "90.0%, peers were up 94.9% of the time"
    assert not check(made, min_pace=0.91).passed
    none = evidence(tmp_path / "2", rows, **strikes((0.5, "freeze", "b"), (28.5, "thaw", "b")))
    assert check(none, min_pace=0.1).measured == "not measured: no round was without faults"


def test_attendance(tmp_path: Path) -> None:
    rows = [record(n, 2.0 * n, ["a", "b"] if n != 3 else ["a"]) for n in range(1, 11)]
    made = evidence(tmp_path / "1", {"a": rows, "b": rows})
    found = check(made, min_attendance=0.9)
    assert found.passed and found.measured == "b in 9 of 10, the others in as many or more"
    assert not check(made, min_attendance=1.0).passed
    assert not check(evidence(tmp_path / "2", {"a": []}), min_attendance=0.1).passed


def test_idle(tmp_path: Path) -> None:
    calm = [record(n, 2.0 * n, round_s=sum(record(1, 0.0)["seconds"].values())) for n in range(1, 5)]
    long = [record(n, 2.0 * n, round_s=sum(record(1, 0.0)["seconds"].values()) + 1.0) for n in range(1, 5)]
    made = evidence(tmp_path / "1", {"a": calm, "b": long})
    whole = long[0]["round_s"]
    assert check(made, max_idle=1.1 / whole).passed
    found = check(made, max_idle=0.9 / whole)
    assert not found.passed and found.measured == f"b {1 / whole:.1%}, no other more"
    assert not check(evidence(tmp_path / "2", {"a": []}), max_idle=1.0).passed


def test_the_long_run(tmp_path: Path) -> None:
    found = report(long_run(tmp_path))
    assert [row["name"] for row in found["checks"] if not row["passed"]] == ["links", "efficiency"]
    assert not found["passed"]
