"""The report of a swarm, from made-up records."""

import pytest

from p2pllm_peers.lab.report import anatomy, overhead, summarise


def record(number: int, **changes) -> dict:
    return {
        "round": number,
        "unix_time": 100.0 + number,
        "samples": 8,
        "tokens": 256,
        "members": {"a": 4, "b": 4},
        "loss": 5.0 - number,
        "validation_loss": None,
        "state_digest": f"{number:02x}" * 32,
        "bytes_sent": 1000,
        "seconds": {"compute": 2.0, "roster": 0.1, "exchange": 0.2, "vote": 0.3, "outer_step": 0.0, "digest": 0.4},
    } | changes


def test_two_peers_that_agree() -> None:
    report = summarise({"a": [record(1), record(2, validation_loss=2.5)], "b": [record(1, unix_time=101.5), record(2)]})
    assert report["rounds_committed"] == 2 and report["diverged_rounds"] == []
    assert report["tokens"] == 512, "a round counts once, however many peers recorded it"
    assert report["tokens_per_s"] == pytest.approx(256.0)
    first, second = report["rounds"]
    assert first["unix_time"] == 101.0 and first["members"] == 2 and first["validation_loss"] is None
    assert second["validation_loss"] == 2.5
    assert second["digests"] == {"a": "02" * 32, "b": "02" * 32}
    assert report["overhead_median_s"] == pytest.approx(1.0)
    assert report["round_seconds"]["compute"] == {"median": 2.0, "max": 2.0}


def test_states_that_differ_are_named() -> None:
    report = summarise({"a": [record(1), record(2)], "b": [record(1), record(2, state_digest="ff" * 32)]})
    assert report["diverged_rounds"] == [2]


def test_a_peer_that_missed_rounds() -> None:
    report = summarise({"a": [record(1), record(2), record(3)], "b": [record(3)], "c": []})
    assert [len(row["digests"]) for row in report["rounds"]] == [1, 1, 2]
    assert report["rounds_committed"] == 3 and report["diverged_rounds"] == []


def test_nothing_happened() -> None:
    for records in ({}, {"a": []}):
        report = summarise(records)
        assert report["rounds"] == [] and report["tokens"] == 0 and report["rounds_committed"] == 0
        assert report["tokens_per_s"] is None and report["overhead_median_s"] is None
        assert report["round_seconds"] == {}


def test_no_rate_without_a_span() -> None:
    assert summarise({"a": [record(1)]})["tokens_per_s"] is None
    assert summarise({"a": [record(1), record(2, unix_time=101.0)]})["tokens_per_s"] is None


def test_where_the_time_goes() -> None:
    slow = record(2, seconds={"compute": 4.0, "exchange": 3.0})
    assert anatomy({"a": [record(1)], "b": [slow]})["exchange"] == {"median": 1.6, "max": 3.0}
    assert overhead({"a": [record(1)], "b": [slow]}) == pytest.approx(2.0)
