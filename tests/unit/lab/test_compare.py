"""Two made-up runs side by side."""

from pathlib import Path
from typing import Any

import pytest
from fake_runs import evidence, long_run, peer, record, strikes

from p2pllm_peers.lab.reporting.compare import MAX_LOSSES, compare, rows
from p2pllm_peers.lab.reporting.report import report


def made(folder: Path, step_s: float, **facts: Any) -> dict:
    """Two peers, a round in `step_s`, whose validation loss falls by 0.05 a round."""
    lines = [record(n, step_s * n, validation_loss=4.0 - 0.05 * n, round_s=step_s) for n in range(1, 21)]
    return report(evidence(folder, {"a": lines, "b": lines}, **facts))


def by_name(comparison: dict) -> dict[str, tuple]:
    return {row["what"]: (row["a"], row["b"], row["ratio"]) for row in comparison["rows"]}


def test_twice_as_fast(tmp_path: Path) -> None:
    found = compare(made(tmp_path / "1", 4.0), made(tmp_path / "2", 2.0))
    figures = by_name(found)
    assert found["warnings"] == []
    assert figures["speed"] == (pytest.approx(64.0), pytest.approx(128.0), pytest.approx(2.0))
    assert figures["time between rounds, median"][2] == pytest.approx(0.5)
    assert figures["final validation loss"] == (3.0, 3.0, 1.0)
    assert figures["time to a validation loss of 3.0"] == (80.0, 40.0, 0.5)
    assert figures["idle of a round, median"][:2] == (pytest.approx(2.5), pytest.approx(0.5))
    assert figures["efficiency"] == (None, None, None) and figures["bytes a token"] == (None, None, None)
    assert figures["validation of a round, median"][2] == pytest.approx(1.0)
    losses = [name.split()[-1] for name in figures if name.startswith("time to a validation loss")]
    assert losses == ["3.9", "3.6", "3.3", "3.0"] and len(losses) <= MAX_LOSSES, "spread over 4.0 to 3.0"


def test_recoveries(tmp_path: Path) -> None:
    faulty = made(tmp_path / "1", 4.0, **strikes((9.0, "freeze", "b")))
    figures = by_name(compare(faulty, made(tmp_path / "2", 2.0)))
    assert figures["others' next commit after a fault, median"] == (pytest.approx(3.0), None, None)


def test_what_makes_runs_hard_to_compare(tmp_path: Path) -> None:
    model = {"config": {"hidden_size": 64, "num_hidden_layers": 4}}
    one = made(tmp_path / "1", 2.0, scenario={"seed": 1, "run": {"model": model}, "links": {"home": {"up_mbit": 5,
               "down_mbit": 5}}}, peers=[peer("a", link="home"), peer("b", cores=0.5)],
               **strikes((5.0, "kill", "a")))  # fmt: skip
    model = {"config": {"hidden_size": 128, "num_hidden_layers": 4}}
    two = made(tmp_path / "2", 2.0, scenario={"seed": 2, "run": {"model": model, "name": "other"}, "links": {"far":
               {"up_mbit": 1, "down_mbit": 5}}, "peers": [{"micro_batch": 8}]}, interrupted=True, cpus=8,
               peers=[peer("a", link="far"), peer("b")], **strikes((5.0, "kill", "a"), (9.0, "freeze", "b"))
               )  # fmt: skip
    told = {row["what"]: (row["a"], row["b"]) for row in compare(one, two)["warnings"]}
    assert told == {
        "run.model.config.hidden_size": ("64", "128"),
        "scenario's seed": ("1", "2"),
        "links.a.up_mbit": ("5.0", "1.0"),
        "cores.b": ("0.5", "0.0"),
        "micro_batch.peer": ("4", "8"),
        "events, from number 2 on": ("–", "at_s 9.0, do freeze, peer b, args {},..."),
        "cores of the machine": ("2", "8"),
        "interrupted": ("False", "True"),
    }


def test_rows_are_a_table_of_text(tmp_path: Path) -> None:
    found = compare(report(long_run(tmp_path / "1")), report(long_run(tmp_path / "2", seed=8, cpus=4)))
    table = rows(found)
    assert table[0] == ("", "everything, seed 7", "everything, seed 7", "second / first")
    assert all(len(row) == 4 and all(isinstance(cell, str) for cell in row) for row in table)
    cells = {row[0]: row for row in table}
    assert cells["efficiency"][1].endswith("%") and cells["bytes a round"][1].endswith(" MB")
    assert cells["DIFFERS: cores of the machine"] == ("DIFFERS: cores of the machine", "2", "4", "")
    assert float(cells["speed"][3]) == pytest.approx(1.0, abs=0.2)
