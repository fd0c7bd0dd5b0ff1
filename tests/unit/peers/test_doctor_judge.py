"""What follows from findings: every verdict, everything that may help most, and what is said about it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest

from p2pllm.network.lookback import Seen
from p2pllm_peers.doctor.findings import Compute, DiskNeed, Findings, Memory, Outside, Run, Traffic
from p2pllm_peers.doctor.judge import disk_short, judge, memory_fit, share_of_swarm
from p2pllm_peers.doctor.words import as_json, checks, heading

GB = 10**9

FIT = Findings(
    run=Run("stdlib-llama", "ab" * 32, known=True),
    compute=Compute("cpu", 4, tokens_per_s=1000.0, measured_s=4.0, parameters=800_000),
    memory=Memory(needed_bytes=GB, free_bytes=4 * GB),
    traffic=Traffic(3, round_s=5.0, round_up_bytes=1_000_000, round_down_bytes=1_000_000, measured=True),
    disk=DiskNeed(snapshots_bytes=GB, text_bytes=GB, home_free_bytes=9 * GB, cache_free_bytes=9 * GB),
    outside=Outside(
        asked=2,
        peers=2,
        swarm_tokens_per_s=3000.0,
        clock_skew_s=0.1,
        clock_error_s=0.02,
        how="direct",
        scope="internet",
        seen_as="198.51.100.7",
        port=4001,
        upload_mbit=20.0,
    ),
)
"""A machine that is fit for a run; each test spoils one thing, or several."""


def spoiled(**changes: dict[str, object]) -> Findings:
    """FIT with other fields: spoiled(memory={"free_bytes": 1})."""
    parts = {name: replace(getattr(FIT, name), **fields) for name, fields in changes.items()}
    return replace(FIT, **parts)


ARITHMETIC = {"arithmetic_problem": "This machine computes the outer step differently."}
KILLED = {"compute": {"killed": 3, "failure": "The system ended the compute process 3 times (signal 9)."}}
NO_MEMORY = {"memory": {"free_bytes": GB // 2}}
NO_DISK = {"disk": {"home_free_bytes": GB, "cache_free_bytes": GB}}
WRONG_CLOCK = {"outside": {"clock_skew_s": -90.0}}


def test_a_fit_machine() -> None:
    verdict = judge(FIT)
    assert verdict.can_take_part and verdict.would_help and verdict.most == "nothing"
    assert "1,000 tokens/s" in verdict.reason and "25%" in verdict.reason


@pytest.mark.parametrize(
    ("found", "most", "words"),
    [
        (replace(FIT, **ARITHMETIC), "arithmetic", "outer step"),
        (spoiled(disk={"text_problem": "There is no readable text."}), "text", "readable"),
        (spoiled(**KILLED), "memory", "signal 9"),
        (spoiled(compute={"failure": "A step takes longer than 22 s here."}), "compute", "longer"),
        (spoiled(**NO_MEMORY), "memory", "1.00 GB of memory, and 0.50 GB"),
        (spoiled(**NO_DISK), "disk", "1.00 GB more disk"),
        (spoiled(**WRONG_CLOCK), "clock", "90 s"),
    ],
)
def test_what_keeps_a_machine_out(found: Findings, most: str, words: str) -> None:
    verdict = judge(found)
    assert not verdict.can_take_part and not verdict.would_help
    assert verdict.most == most and words in verdict.reason and verdict.advice.endswith(".")
    assert verdict.reason.endswith(".")
    assert "no" in {check.mark for check in checks(found)}


@pytest.mark.parametrize(
    ("found", "most", "words"),
    [
        (spoiled(compute={"micro_batch_reduced": True, "micro_batch": 2}), "memory", "micro-batch of 2"),
        (spoiled(compute={"killed": 1, "micro_batch": 1}), "memory", "micro-batch of 1"),
        (spoiled(outside={"clock_skew_s": 40.0}), "clock", "40 s"),
        (spoiled(outside={"upload_mbit": 2.0}), "upload", "4.0 s of its 5.0 s"),
        (spoiled(outside={"upload_mbit": 2.0, "upload_limited": True}), "upload", "raise --upload"),
        (spoiled(outside={"how": "outgoing", "port": 31337}), "reachability", "TCP 31337"),
        (spoiled(outside={"how": "relay"}), "reachability", "router"),
        (spoiled(outside={"swarm_tokens_per_s": 60_000.0}), "compute", "GPU"),
    ],
)
def test_what_would_help_a_machine_that_can_take_part(found: Findings, most: str, words: str) -> None:
    verdict = judge(found)
    assert verdict.can_take_part and verdict.would_help
    assert verdict.most == most and words in verdict.advice and verdict.advice.endswith(".")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (spoiled(outside={"swarm_tokens_per_s": 250_000.0}), "0.40% of the swarm"),
        (spoiled(outside={"upload_mbit": 1.0}), "8.0 s for a round of 5.0 s"),
    ],
)
def test_a_machine_that_would_not_help_is_told_so(found: Findings, words: str) -> None:
    verdict = judge(found)
    assert verdict.can_take_part and not verdict.would_help and words in verdict.reason


def test_the_worst_comes_first() -> None:
    """Each of these alone is a verdict of its own, see above; together the first wins, then the next one, and so on."""
    ranked = [
        ("memory", {"compute": {"micro_batch_reduced": True}}),
        ("clock", {"outside": {"clock_skew_s": 40.0}}),
        ("upload", {"outside": {"upload_mbit": 2.0}}),
        ("reachability", {"outside": {"how": "outgoing"}}),
        ("compute", {"outside": {"swarm_tokens_per_s": 60_000.0}}),
        ("nothing", {}),
    ]
    for first, (most, _) in enumerate(ranked):
        changes: dict[str, dict[str, object]] = {}
        for _, fields in ranked[first:]:
            for part, values in fields.items():
                changes[part] = {**changes.get(part, {}), **values}
        assert judge(spoiled(**changes)).most == most
    out = [("memory", NO_MEMORY), ("disk", NO_DISK), ("clock", WRONG_CLOCK)]
    for first, (most, _) in enumerate(out):
        changes = {part: fields for _, change in out[first:] for part, fields in change.items()}
        assert judge(spoiled(**changes)).most == most


def test_a_clock_counts_only_as_far_as_it_is_known() -> None:
    assert judge(spoiled(outside={"clock_skew_s": 61.0, "clock_error_s": 5.0})).can_take_part
    assert judge(spoiled(outside={"clock_skew_s": 31.0, "clock_error_s": 5.0})).most == "nothing"
    assert not judge(spoiled(outside={"clock_skew_s": 66.0, "clock_error_s": 5.0})).can_take_part


def test_disks_are_added_up_only_where_they_are_one() -> None:
    one = spoiled(disk={"home_free_bytes": 3 * GB // 2, "cache_free_bytes": 3 * GB // 2})
    assert disk_short(one) == GB // 2
    assert disk_short(spoiled(disk={**dataclasses.asdict(one.disk), "same_disk": False})) == 0
    assert disk_short(spoiled(disk={"home_free_bytes": 0, "same_disk": False})) == GB


def test_what_a_peer_has_already_needs_no_room() -> None:
    here = spoiled(disk={"home_free_bytes": GB // 2, "cache_free_bytes": GB // 2})
    assert disk_short(here) == 3 * GB // 2
    here = spoiled(disk={**dataclasses.asdict(here.disk), "home_here_bytes": 3 * GB // 4, "text_here_bytes": 2 * GB})
    assert disk_short(here) == 0 and judge(here).can_take_part
    assert disk_short(spoiled(disk={**dataclasses.asdict(here.disk), "same_disk": False, "cache_free_bytes": 0})) == 0
    assert "2.8 GB of it here already" in next(check.text for check in checks(here) if check.name == "disk")


def test_what_was_not_checked_counts_as_good_and_is_said() -> None:
    alone = replace(FIT, run=Run("mine"), outside=Outside(why_not="there was no invite"))
    verdict = judge(alone)
    assert verdict.can_take_part and verdict.would_help and verdict.most == "nothing"
    assert share_of_swarm(alone) is None and "swarm" not in verdict.reason
    marks = {check.name: check for check in checks(alone)}
    for name in ("line up", "clock", "reachable"):
        assert marks[name].mark == "-" and "no invite" in marks[name].text
    assert judge(replace(alone, compute=replace(FIT.compute, tokens_per_s=90.0))).most == "compute"
    assert judge(replace(alone, compute=replace(FIT.compute, tokens_per_s=90.0, device="cuda:0"))).most == "nothing"


def test_a_fit_machine_has_no_bad_mark() -> None:
    assert {check.mark for check in checks(FIT)} == {"ok"}
    assert memory_fit(FIT) == "yes"
    assert "run stdlib-llama abababababababab" in heading(FIT) and "run file" in heading(replace(FIT, run=Run("mine")))
    reach = next(check for check in checks(FIT) if check.name == "reachable")
    assert "198.51.100.7 port 4001" in reach.text and "internet" in reach.text


def test_json_has_plain_values_and_units_in_its_names() -> None:
    said = json.loads(json.dumps(as_json(FIT, judge(FIT))))
    assert said["can_take_part"] is True and said["helps_most"] == "nothing" and said["memory_fit"] == "yes"
    assert said["swarm_share"] == 0.25 and said["upload_s_per_round"] == pytest.approx(0.4)
    assert said["disk_needed_bytes"] == 2 * GB and said["outside"]["clock_skew_s"] == 0.1
    failed = as_json(spoiled(**KILLED), judge(spoiled(**KILLED)))
    assert failed.keys() == said.keys() and failed["memory_fit"] == "no"


def seen(host: str, skew: float = 0.0, trip: float = 0.1, **took: bool) -> Seen:
    return Seen("peer", skew, trip, host, {int(port[1:]): answer for port, answer in took.items()})


def test_views_of_several_peers_come_to_one() -> None:
    from p2pllm_peers.doctor.outside import view_of  # loads hivemind

    both = view_of(
        [seen("192.168.1.5", -2.0, p4001=True), seen("8.8.8.8", -3.0, 0.2, p4001=False)], relayed=False, port=1
    )
    assert (both.how, both.scope, both.seen_as, both.port) == ("direct", "local network", "192.168.1.5", 4001)
    assert both.clock_skew_s == 2.5 and both.clock_error_s == 0.05
    shut = view_of([seen("8.8.8.8", p4001=False)], relayed=False, port=4001)
    assert (shut.how, shut.scope, shut.port) == ("outgoing", "internet", 4001)
    assert view_of([seen("8.8.8.8", p4001=False)], relayed=True, port=4001).how == "relay"
    untested = view_of([seen("8.8.8.8")], relayed=False, port=4001)
    assert untested.how is None and untested.why_not and untested.clock_skew_s == 0
    assert view_of([], relayed=False, port=0).why_not
    hidden = view_of([seen("")], relayed=True, port=4001)  # it is met through a relay
    assert (hidden.how, hidden.scope) == ("relay", "")
    reach = next(check for check in checks(replace(FIT, outside=hidden)) if check.name == "reachable")
    assert reach.text == "behind NAT, through a relay; the peers that were asked see no address of it"
