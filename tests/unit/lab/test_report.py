"""The report of made-up runs whose figures are known: rounds, speed, losses, costs, links, and what is damaged."""

import json
from pathlib import Path

import pytest
from fake_runs import digest, evidence, long_run, peer, record, sample, strikes

from p2pllm.errors import UsageError
from p2pllm_peers.lab.evidence import Evidence, LinkCheck
from p2pllm_peers.lab.reporting.report import report, summary_lines

TOKENS = 2 * 4 * 32
"""Of one round of two peers."""


def both(*rows: dict) -> dict:
    """Two peers that recorded the same."""
    return {"a": list(rows), "b": list(rows)}


def test_two_peers_that_agree(tmp_path: Path) -> None:
    rows = [record(1, 2.0), record(2, 4.0, validation_loss=4.55), record(3, 8.0)]
    late = [dict(row, unix_time=row["unix_time"] + 0.5) for row in rows]
    found = report(evidence(tmp_path, {"a": rows, "b": late}))
    assert [row["round"] for row in found["rounds"]] == [1, 2, 3]
    second = found["rounds"][1]
    assert second["time_s"] == pytest.approx(4.0), "the first who recorded it"
    assert second["members"] == ["a", "b"] and second["digests"] == {"a": digest(2), "b": digest(2)}
    assert second["tokens"] == TOKENS and second["tokens_so_far"] == 2 * TOKENS
    assert second["loss"] == pytest.approx(5.8) and second["validation_loss"] == 4.55
    swarm = found["swarm"]
    assert swarm["rounds"] == swarm["recorded_rounds"] == 3 and swarm["tokens"] == 3 * TOKENS
    assert swarm["tokens_per_s"] == pytest.approx(2 * TOKENS / 6.0), "what was trained after the first commit"
    assert swarm["round_interval_s"] == pytest.approx(3.0)
    assert swarm["final_validation_loss"] == 4.55 and swarm["final_loss"] == pytest.approx(5.7)
    assert found["diverged"] == found["lost"] == found["abandoned"] == found["branches"] == []


def test_the_steady_span_leaves_out_the_warm_up_and_what_was_before_the_clock(tmp_path: Path) -> None:
    early = [record(number, -30.0 + number) for number in range(1, 10)]
    timed = [record(10, 1.0), record(11, 9.0), record(12, 10.0)] + [record(10 + n, 10.0 + 2 * n) for n in range(3, 8)]
    steady = report(evidence(tmp_path, both(*early, *timed)))["swarm"]["steady"]
    assert steady["from_s"] == pytest.approx(10.0) and steady["to_s"] == pytest.approx(24.0)
    assert steady["tokens"] == 5 * TOKENS


@pytest.mark.parametrize(
    ("alone", "alone_s", "share", "why"),
    [
        ((100.0, 60.0), 5, 0.8, ""),
        ((100.0, None), 5, None, "not every peer"),
        ((None, None), 0, None, "no alone_s"),
    ],
)
def test_efficiency(tmp_path: Path, alone: tuple, alone_s: float, share: float | None, why: str) -> None:
    peers = [peer(name, alone_tokens_per_s=rate) for name, rate in zip("ab", alone, strict=True)]
    rows = both(*(record(number, 2.0 * number) for number in range(1, 5)))
    swarm = report(evidence(tmp_path, rows, peers=peers, scenario={"alone_s": alone_s}))["swarm"]
    assert swarm["tokens_per_s"] == pytest.approx(128.0)
    assert swarm["efficiency"] == (None if share is None else pytest.approx(share))
    assert why in swarm["why_no_efficiency"] and bool(why) == (share is None)


def test_when_validation_losses_were_reached(tmp_path: Path) -> None:
    losses = (3.05, 3.2, 2.8, 2.81)
    rows = [record(n, 10.0 * n, validation_loss=loss) for n, loss in enumerate(losses, 1)]
    reached = report(evidence(tmp_path, both(*rows)))["reached"]
    times = [(row["validation_loss"], row["time_s"], row["round"], row["tokens"]) for row in reached]
    assert times == [(3.1, 10.0, 1, TOKENS), (3.0, 30.0, 3, 3 * TOKENS), (2.9, 30.0, 3, 3 * TOKENS),
                     (2.8, 30.0, 3, 3 * TOKENS)]  # fmt: skip


def test_parts_of_a_round(tmp_path: Path) -> None:
    old = record(2, 4.0)
    del old["round_s"], old["traffic"]
    found = report(evidence(tmp_path, {"a": [record(1, 2.0), old]}))
    first, second = found["parts"]
    assert first["apply"] == pytest.approx(0.05) and first["idle"] == pytest.approx(2.0 - 1.5)
    assert second["idle"] is None and second["compute"] == 1.0
    assert found["anatomy"]["peers"]["a"]["idle"]["median"] == pytest.approx(0.5), "only where it is known"
    assert found["swarm"]["overhead_s"] == pytest.approx(0.4)


def test_bytes_by_both_counters(tmp_path: Path) -> None:
    own = {"control_sent": 10, "control_received": 20, "updates_sent": 300, "updates_received": 400, "state_sent": 5}
    samples = [
        sample(1.0, a={"phase": "collecting", "wire_up": 100, "wire_down": 50, "cpu_s": 1.0, "traffic": {}}),
        sample(2.0, a={"phase": "collecting", "wire_up": 512, "wire_down": 768, "cpu_s": 3.5, "traffic": own}),
        sample(3.0, a={"phase": ""}),
    ]
    found = report(evidence(tmp_path, both(record(1, 2.0), record(2, 4.0)), samples=samples, parameters=1000))
    first, second = found["peers"]
    assert first["wire"] == {"up": 512, "down": 768} and first["payload"] == {"sent": 315, "received": 420}
    assert first["own"] == own and first["cpu_s"] == 3.5
    assert first["rounds"] == 2 and first["samples"] == 8 and first["tokens"] == 256
    assert first["bytes_per_round"] == {"up": 256, "down": 384} and first["bytes_per_token"] == {"up": 2, "down": 3}
    assert first["bits_per_parameter"] == {"updates": 8 * own["updates_sent"] / 2e3, "payload": 1.26, "wire": 2.048}
    assert "bits sent by a peer in a round, for each parameter (mean): updates" in "\n".join(summary_lines(found))
    assert second["wire"] == {"up": None, "down": None} and second["payload"] == {"sent": None, "received": None}
    assert found["swarm"]["bytes"] == {
        "source": "wire", "total": 512, "payload": 315, "per_round": 256, "per_token": 1.0, "cpu_s": 3.5
    }  # fmt: skip


def test_own_counters_of_several_lives_add_up(tmp_path: Path) -> None:
    """Killed at 20 s, back at 30 s; a sample still shows what the dead process had said."""
    said = {"phase": "collecting", "traffic": {"updates_sent": 90}}
    samples = [sample(19.0, a=said), sample(21.0, a=said), sample(31.0, a=said)]
    rows = [record(1, 10.0, traffic={"updates_sent": 100}), record(9, 40.0, traffic={"updates_sent": 7})]
    peers = [peer("a", ready_s=[-1.0, 30.0], ended_s=[20.0, 99.5])]
    (found,) = report(evidence(tmp_path, {"a": rows}, peers=peers, samples=samples))["peers"]
    assert found["own"] == {"updates_sent": 107}


def test_samples_of_a_peer_that_lost_its_identity(tmp_path: Path) -> None:
    rows = [record(1, 2.0, members={"id-a": 4, "old-b": 5}), record(2, 4.0, members={"id-a": 4, "id-b": 6})]
    found = report(evidence(tmp_path, {"a": rows}, peers=[peer("a"), peer("b", former_ids=["old-b"])]))
    assert [row["samples"] for row in found["peers"]] == [8, 11]
    assert found["rounds"][0]["members"] == ["a", "b"]


def test_lines_are_judged_by_their_tolerance(tmp_path: Path) -> None:
    link = LinkCheck(
        peer="a", asked_up_mbit=10, measured_up_mbit=9.5, asked_down_mbit=100, measured_down_mbit=94.9,
        asked_delay_ms=10, measured_delay_ms=12, asked_loss=0.02, measured_loss=0.05,
    )  # fmt: skip
    far = link.model_copy(update={"peer": "b", "asked_delay_ms": 100.0, "measured_delay_ms": 104.9, "asked_loss": 0.0})
    found = report(evidence(tmp_path, both(record(1, 2.0)), links=[link, far]))["links"]
    told = {(row["peer"], row["what"]): row["passed"] for row in found}
    assert told["a", "up"] and not told["a", "down"]
    assert told["a", "delay one way"] and told["b", "delay one way"]
    assert told["a", "loss there and back"] is None
    assert found[0]["unit"] == "Mbit/s" and found[0]["tolerance"] == pytest.approx(0.5)


def test_own_counters_where_a_life_ended_before_it_was_ready(tmp_path: Path) -> None:
    """Killed at 20 s, and again at 25 s, while it started."""
    rows = [record(1, 10.0, traffic={"updates_sent": 100}), record(9, 40.0, traffic={"updates_sent": 7})]
    peers = [peer("a", ready_s=[-1.0, 30.0], ended_s=[20.0, 25.0, 99.5])]
    (found,) = report(evidence(tmp_path, {"a": rows}, peers=peers))["peers"]
    assert found["own"] == {"updates_sent": 107}


def test_damaged_records(tmp_path: Path) -> None:
    torn = json.dumps(record(2, 4.0))[:40] + "\n"
    flipped = json.dumps(record(3, 6.0)).replace('"round": 3', '"rounf": 3') + "\n"
    found = report(evidence(tmp_path, {"a": [record(1, 2.0), torn, flipped, "7\n", record(4, 8.0)]}))
    assert [row["round"] for row in found["rounds"]] == [1, 4]
    assert found["notes"] == ["The records of a have 2 damaged lines."], "a torn one is what kills leave"


def test_losses_that_are_not_numbers(tmp_path: Path) -> None:
    found = report(evidence(tmp_path, {"a": [record(1, 2.0, loss=float("nan"), validation_loss=float("inf"))]}))
    assert found["rounds"][0]["loss"] is None and found["rounds"][0]["validation_loss"] is None
    json.dumps(found, allow_nan=False)


def test_nothing_happened(tmp_path: Path) -> None:
    found = report(evidence(tmp_path, {"a": [], "b": []}, ended_s=0.0))
    assert found["rounds"] == [] and found["swarm"]["rounds"] == 0 and found["swarm"]["tokens_per_s"] is None
    assert found["swarm"]["bytes"]["source"] is None and not found["run"]["ended"] and not found["passed"]
    assert summary_lines(found)[0] == "made-up: 0.0 s, 2 peers"


def test_what_peers_did_while_leaving_does_not_count(tmp_path: Path) -> None:
    rows = {"a": [record(1, 2.0), record(2, 99.5, ["a"])], "b": [record(1, 2.0), record(2, 99.6, ["b"])]}
    rows["b"][1]["record_digest"] = digest(2, "other")
    found = report(evidence(tmp_path, rows))
    assert found["swarm"]["rounds"] == 1 and found["lost"] == []


def test_peers_that_trained_to_the_last_round_are_done(tmp_path: Path) -> None:
    """They left by themselves before the lab noticed, and agree, or do not."""
    peers = [peer(name, ended_s=[7.0]) for name in ("a", "b", "c")]
    rows = {name: [record(n, 2.0 * n, ("a", "b", "c")) for n in (1, 2, 3)] for name in ("a", "b", "c")}
    fields = {"peers": peers, "ended_s": 7.1, "scenario": {"run": {"round": {"rounds": 3}}}}
    found = report(evidence(tmp_path / "1", rows, **fields))
    assert found["swarm"]["completed"] and found["passed"], found["checks"]
    assert [(row["state"], row["behind"], row["settling"]) for row in found["at_end"]] == [("done", 0, False)] * 3
    rows["c"][2]["record_digest"] = digest(3, "flipped")
    found = report(evidence(tmp_path / "2", rows, **fields))
    assert [check["name"] for check in found["checks"] if not check["passed"]] == [
        "no divergence",
        "agreement at the end",
    ]


def test_a_folder_of_another_version(tmp_path: Path) -> None:
    evidence(tmp_path, {"a": []})
    (tmp_path / "samples.jsonl").write_text('{"t": 1.0, "nobody": {}}')
    with pytest.raises(
        UsageError, match=r"samples\.jsonl is damaged or .*: peers is missing; read it with .* wrote it\.$"
    ):
        Evidence(tmp_path)
    (tmp_path / "lab.json").write_text((tmp_path / "lab.json").read_text().replace('"cpus"', '"cpu"'))
    with pytest.raises(UsageError, match=r"lab\.json is damaged or of another .*: cpu is not a known field \(did you"):
        Evidence(tmp_path)


def test_events_are_the_plan_and_nothing_else(tmp_path: Path) -> None:
    planned = strikes((5.0, "kill", "b"), (9.0, "restart", "b", {"keep_disk": True}))
    on_time = report(evidence(tmp_path / "1", both(record(1, 2.0)), **planned))
    planned["struck"][0].at_s, planned["struck"][1].error = 7.7, "it did not start"
    other = report(evidence(tmp_path / "2", both(record(1, 3.0)), **planned))
    assert (
        on_time["events"]
        == other["events"]
        == [
            {"at_s": 5.0, "do": "kill", "peer": "b", "args": {}, "phase": "", "undoes": None},
            {"at_s": 9.0, "do": "restart", "peer": "b", "args": {"keep_disk": True}, "phase": "", "undoes": None},
        ]
    )
    assert on_time["struck"] != other["struck"]


def test_the_same_evidence_gives_the_same_report(tmp_path: Path) -> None:
    first, second = (json.dumps(report(long_run(tmp_path / name)), allow_nan=False) for name in ("one", "two"))
    assert first == second


def test_summary_of_a_long_run(tmp_path: Path) -> None:
    lines = summary_lines(report(long_run(tmp_path, interrupted=True, notes=["no root"])))
    assert lines[0] == "everything: 5 min 0 s, 6 peers, interrupted"
    assert "fork of adsl-0, adsl-1" in "\n".join(lines)
    (kills,) = (line for line in lines if line.startswith("2 kills: others' next commit after "))
    assert "; beyond a round " in kills and "; back after " in kills
    assert "links: 17 of 18 measured values within tolerance" in lines
    assert lines[-2].startswith("FAILED efficiency: 2") and lines[-1] == "note: no root"
