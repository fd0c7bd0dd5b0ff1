"""One table of names: what is exported, documented and drawn is exactly what is in it."""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from metric_samples import STATUS, record
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from p2pllm.metric_names import LABELS, METRICS, as_markdown, curves
from p2pllm.record_fields import FIELDS, fields_as_markdown
from p2pllm.sinks import PrometheusCollector
from p2pllm.tally import Reading, Tally

ROOT = Path(__file__).resolve().parents[3]
NAME = re.compile(r"\bp2pllm_\w+")
DASHBOARD = json.loads((ROOT / "cli/p2pllm_cli/grafana.json").read_text())


def tally_of(*records: Any) -> Tally:
    tally = Tally()
    for one in records:
        tally.add(one)
    return tally


def exported(*readings: Reading) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name -> (labels, value) of every sample that Prometheus gets."""
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(lambda: readings))
    found = dict[str, list[tuple[dict[str, str], float]]]()
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.fixture(scope="module")
def full() -> dict[str, list[tuple[dict[str, str], float]]]:
    records = [record(1, validation_loss=3.25), record(2, attempts=3), record(3)]
    return exported(Reading("3d69", "founder", STATUS, tally_of(*records)))


def test_exactly_the_names_of_the_table_are_exported_with_their_labels(full) -> None:
    assert list(full) == [metric.name for metric in METRICS]
    for metric in METRICS:
        for labels, _ in full[metric.name]:
            assert set(labels) == {*LABELS, *metric.labels}, metric.name
            assert (labels["run"], labels["peer"]) == ("3d69", "founder")


@pytest.mark.parametrize(
    ("name", "own_labels", "value"),
    [
        ("p2pllm_up", {}, 1),
        ("p2pllm_peer_info", {"run_name": "stdlib-llama", "peer_id": "12D3KooWAAAA", "device": "cpu"}, 1),
        ("p2pllm_phase", {"phase": "collecting"}, 1),
        ("p2pllm_paused", {}, 0),
        ("p2pllm_behind_rounds", {}, 2),
        ("p2pllm_members", {}, 2),
        ("p2pllm_computed_tokens_total", {}, 123456),
        ("p2pllm_traffic_bytes_total", {"kind": "updates", "direction": "received"}, 2000),
        ("p2pllm_worker_restarts_total", {}, 2),
        ("p2pllm_micro_batch_samples", {}, 4),
        ("p2pllm_training_loss_nats", {}, 3.25),
        ("p2pllm_validation_loss_nats", {}, 3.25),
        ("p2pllm_last_round_number", {}, 3),
        ("p2pllm_last_round_own_samples", {}, 208),
        ("p2pllm_last_round_part_seconds", {"part": "exchange"}, 0.25),
        ("p2pllm_last_round_tokens_per_second", {}, 48_128 / 1.5),
        ("p2pllm_recorded_rounds_total", {}, 3),
        ("p2pllm_recorded_own_samples_total", {}, 624),
        ("p2pllm_failed_attempts_total", {}, 2),
        ("p2pllm_recorded_part_seconds_total", {"part": "compute"}, 3),
    ],
)
def test_the_numbers_are_those_of_the_status_and_the_records(full, name, own_labels, value) -> None:
    assert ({"run": "3d69", "peer": "founder", **own_labels}, pytest.approx(value)) in full[name]


def test_a_peer_that_does_not_run_is_down_and_keeps_what_it_recorded() -> None:
    found = exported(Reading("3d69", "founder", None, tally_of(record(1))))
    assert found["p2pllm_up"][0][1] == 0
    assert found["p2pllm_last_round_number"][0][1] == 1
    assert not {"p2pllm_phase", "p2pllm_round", "p2pllm_uptime_seconds", "p2pllm_worker_restarts_total"} & set(found)


def test_a_daemon_that_has_nothing_yet_or_is_of_another_version_is_only_up() -> None:
    strange = {"device": None, "uptime_s": None, "credit": {"complete": True}, "peers": [{}], "round": 3, "traffic": []}
    found = exported(Reading("3d69", "new", strange, Tally()))
    totals = {metric.name for metric in METRICS if metric.name.startswith("p2pllm_recorded") and not metric.labels}
    told = {"p2pllm_round", "p2pllm_members"}
    assert set(found) - told == {"p2pllm_up", "p2pllm_peer_info", "p2pllm_failed_attempts_total"} | totals


def test_names_say_kind_and_unit() -> None:
    families = [metric.name.removesuffix("_total") for metric in METRICS]
    assert len(set(families)) == len(families)  # OpenMetrics takes a counter's name without its suffix
    for metric in METRICS:
        assert metric.meaning.endswith(".") and metric.meaning[0].isupper(), metric.name
        for unit in ("seconds", "bytes"):
            assert (metric.unit == unit) == metric.name.removesuffix("_total").endswith(f"_{unit}"), metric.name


def test_the_sample_of_a_status_is_what_a_daemon_answers() -> None:
    tree = ast.parse((ROOT / "peers/p2pllm_peers/status.py").read_text())
    (method,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "answer")
    (reply,) = (node.value for node in ast.walk(method) if isinstance(node, ast.Return))
    assert isinstance(reply, ast.Dict)
    assert {ast.literal_eval(key) for key in reply.keys if key is not None} == set(STATUS)


def test_curves_have_the_tags_of_the_table() -> None:
    found = curves(record(2, validation_loss=3.0))
    tags = [metric.tag for metric in METRICS if metric.tag]
    assert all(any(tag == name or name.startswith(f"{tag}/") for tag in tags) for name in found)
    assert {"loss/training", "loss/validation", "round/tokens_per_s", "seconds/exchange", "bytes/sent"} <= set(found)
    assert "loss/validation" not in curves(record(2)) and found["bytes/sent"] == 352_140
    assert "round/tokens_per_s" not in curves(record(2, round_s=0.0))


def test_the_table_in_the_documentation_is_this_one() -> None:
    text = (ROOT / "p2pllm/METRICS.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [*as_markdown(), *fields_as_markdown()]
    assert set(NAME.findall(text)) == {metric.name for metric in METRICS}


def test_every_field_of_a_line_is_in_the_table() -> None:
    line = json.loads(record(1, validation_loss=3.0).to_json())
    assert list(FIELDS) == list(line)
    for name, (unit, meaning) in FIELDS.items():
        assert meaning.endswith(".") and (unit or name == "failures")
    assert set(line["seconds"]) <= set(re.findall(r"\w+", FIELDS["seconds"][1]))


def expressions() -> list[str]:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return queries + [one["definition"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_asks_for_nothing_else(expression: str, full) -> None:
    names = NAME.findall(expression)
    assert names and set(names) <= set(full)
    labels = set(re.findall(r'(\w+)=~"', expression)) | {
        label for group in re.findall(r"(?:by|ignoring) \(([^)]*)\)", expression) for label in group.split(", ")
    }
    assert labels <= set().union(*(found for name in names for found, _ in full[name]))


def test_the_panels_of_the_dashboard_lie_side_by_side() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        assert panel["x"] + panel["w"] <= 24
        apart = panel["x"] + panel["w"] <= other["x"] or other["x"] + other["w"] <= panel["x"]
        assert apart or panel["y"] + panel["h"] <= other["y"] or other["y"] + other["h"] <= panel["y"]
