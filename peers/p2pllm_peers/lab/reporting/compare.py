"""Two runs of the lab side by side, from their reports, with ratios and with what makes them hard to compare.

Pure. What does not live here: printing (`p2pllm_cli`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from p2pllm_peers.lab.reporting.commits import PARTS
from p2pllm_peers.lab.reporting.words import amount, median, share, size
from p2pllm_peers.lab.scenario import Scenario

Report = dict[str, Any]
MAX_LOSSES = 5
"""Validation losses that both runs reached and that are compared: spread over all of them, the last one included."""


def compare(report_a: Report, report_b: Report) -> dict[str, Any]:
    """Two reports as {"names", "warnings", "rows"}.

    names: of both runs. warnings: {"what", "a", "b"}, what differs between them besides what they measured, as text.
    rows: {"what", "unit", "a", "b", "ratio"}, where ratio is b / a, None if either was not measured or a is not
    above 0: a time before all were ready is no measure.
    """
    pairs = [
        {
            "what": what,
            "unit": unit,
            "a": a,
            "b": b,
            "ratio": b / a if a and a > 0 and b is not None and b >= 0 else None,
        }
        for what, unit, a, b in _pairs(report_a, report_b)
    ]
    names = [f"{report['run']['name']}, seed {report['run']['seed']}" for report in (report_a, report_b)]
    return {"names": names, "warnings": _warnings(report_a, report_b), "rows": pairs}


def rows(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """A comparison as text: a heading, a row for each figure, and a row for each thing that should be the same."""
    table: list[tuple[str, ...]] = [("", *comparison["names"], "second / first")]
    for row in comparison["rows"]:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.append((row["what"], _cell(row["a"], row["unit"]), _cell(row["b"], row["unit"]), ratio))
    return table + [(f"DIFFERS: {row['what']}", row["a"], row["b"], "") for row in comparison["warnings"]]


def _cell(value: float | None, unit: str) -> str:
    if unit == "B":
        return size(value)
    if unit == "%":
        return share(value)
    if unit == "s":
        return "–" if value is None else f"{value:,.3f} s"
    return amount(value, unit if unit != "nats a token" else "")


def _pairs(a: Report, b: Report) -> Iterator[tuple[str, str, float | None, float | None]]:
    """(what, unit, first, second) of everything that is compared."""
    for what, unit, path in (
        ("speed", "tokens/s", ("swarm", "tokens_per_s")),
        ("speed of the peers alone", "tokens/s", ("swarm", "alone_tokens_per_s")),
        ("efficiency", "%", ("swarm", "efficiency")),
        ("rounds", "rounds", ("swarm", "rounds")),
        ("time between rounds, median", "s", ("swarm", "round_interval_s")),
        ("round that no fault touched, median", "s", ("swarm", "calm_round_s")),
        ("pace, of the rounds without faults", "%", ("swarm", "pace")),
        ("bytes a token", "B", ("swarm", "bytes", "per_token")),
        ("bytes a round", "B", ("swarm", "bytes", "per_round")),
        ("CPU time", "s", ("swarm", "bytes", "cpu_s")),
        ("final training loss", "nats a token", ("swarm", "final_loss")),
        ("final validation loss", "nats a token", ("swarm", "final_validation_loss")),
    ):
        yield what, unit, _at(a, path), _at(b, path)
    yield from _losses(a, b)
    for what, key in (("others' next commit after a fault", "survivors_s"), ("return of the struck", "return_s")):
        yield f"{what}, median", "s", median(a["recoveries"], key), median(b["recoveries"], key)
    for part in PARTS:
        first, second = (_at(report, ("anatomy", "swarm", part, "median")) for report in (a, b))
        yield f"{part} of a round, median", "s", first, second


def _at(report: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        report = report.get(key) if report is not None else None
    return None if report is None else float(report)


def _losses(a: Report, b: Report) -> Iterator[tuple[str, str, float | None, float | None]]:
    times = [{row["validation_loss"]: row["time_s"] for row in report["reached"]} for report in (a, b)]
    common = sorted(times[0].keys() & times[1].keys())
    step = -(-len(common) // MAX_LOSSES)
    for loss in reversed(common[:: max(1, step)]):
        yield f"time to a validation loss of {loss:.1f}", "s", times[0][loss], times[1][loss]


def _warnings(a: Report, b: Report) -> list[dict[str, str]]:
    """What would have to be the same for the figures to mean the same."""
    first, second = (_setup(report) for report in (a, b))
    return [{"what": what, "a": one, "b": other} for what, one, other in _differences("", first, second)]


def _setup(report: Report) -> dict[str, Any]:
    run, scenario = report["run"], report["run"]["scenario"]
    return {
        "run": {key: value for key, value in scenario["run"].items() if key != "name"},
        "scenario's seed": scenario["seed"],
        "duration_s": scenario["duration_s"],
        "links": _links(report),
        "cores": {peer["name"]: peer["cores"] for peer in report["peers"]},
        "micro_batch": {spec.name: spec.micro_batch for spec in Scenario.model_validate(scenario).peer_specs()},
        "events": report["events"],
        "cores of the machine": run["cpus"],
        "version": run["p2pllm"],
        "bytes counted": report["swarm"]["bytes"]["source"],
        "interrupted": run["interrupted"],
    }


def _differences(place: str, one: Any, other: Any) -> Iterator[tuple[str, str, str]]:
    """(path, first, second) of the smallest parts that are not equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from _differences(f"{place}.{key}".lstrip("."), one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list):
        for number, (ours, theirs) in enumerate(itertools.zip_longest(one, other), 1):
            if ours != theirs:  # all that follow may differ, too
                yield f"{place}, from number {number} on", _short(ours), _short(theirs)
                return
    elif one != other:
        yield place, _short(one), _short(other)


def _links(report: Report) -> dict[str, Any]:
    """What was asked of every peer's line; what the links are called does not matter."""
    links = report["run"]["scenario"]["links"]
    return {peer["name"]: links.get(peer["link"]) for peer in report["peers"]}


def _short(value: Any) -> str:
    """Enough of a value to recognise it."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {part}" for key, part in value.items())
    text = "–" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
