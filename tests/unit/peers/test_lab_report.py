"""Where a round's time goes, from the records of a few peers, as benchmarks ask for it."""

import pytest

from p2pllm_peers.lab.reporting.report import anatomy, overhead


def row(**changes: float) -> dict:
    seconds = {"compute": 2.0, "roster": 0.1, "exchange": 0.2, "vote": 0.3, "outer_step": 0.0, "digest": 0.4}
    return {"seconds": seconds | {"validation": 7.0} | changes}


def test_each_part_over_all_peers_and_rounds() -> None:
    found = anatomy({"a": [row()], "b": [row(compute=4.0, exchange=3.0), row(exchange=1.0)]})
    assert found["exchange"] == {"median": 1.0, "mean": pytest.approx(1.4), "max": 3.0}
    assert found["compute"]["median"] == 2.0


def test_overhead_is_what_is_neither_compute_nor_validation() -> None:
    assert overhead({"a": [row()], "b": [row(exchange=2.2)]}) == pytest.approx(2.0)


def test_no_rounds() -> None:
    assert anatomy({"a": []}) == {} and overhead({"a": []}) is None
