"""Every number that other people's tools get of a peer: its name, unit and meaning, and where it is read.

The one table, METRICS. The help texts of `/metrics`, the tags of TensorBoard and W&B, and METRICS.md beside this file
(`p2pllm metrics names`) come from it. What does not live here: the formats of these tools (`sinks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from p2pllm.metrics import RoundRecord
from p2pllm.tally import Reading, Status, Tally

Values = dict[tuple[str, ...], float]
"""Values of a metric's own labels -> number; empty if it is not known."""

LABELS = ("run", "peer")
"""Labels of every metric: the first 16 digits of the run's id, and the peer's name on this machine."""


@dataclass(frozen=True)
class Metric:
    """One row of the table. labels: beside LABELS. tag: its name in tools that draw curves over rounds."""

    name: str
    unit: str
    meaning: str
    read: Callable[[Reading], Values]
    labels: tuple[str, ...] = ()
    tag: str = ""

    @property
    def kind(self) -> Literal["gauge", "counter"]:
        """A counter never falls but when something restarts; its name says that it is one."""
        return "counter" if self.name.endswith("_total") else "gauge"


def _live(name: str, unit: str, meaning: str, read: str | Callable[[Status], Values], *labels: str) -> Metric:
    """Of a running daemon. read: a number of its status, or how to find it there."""

    def values(reading: Reading) -> Values:
        if reading.status is None:
            return {}
        try:
            return _known(reading.status.get(read)) if isinstance(read, str) else read(reading.status)
        except (AttributeError, KeyError, TypeError, ValueError):
            return {}  # a daemon of another version tells it otherwise, and the other peers are to be seen all the same

    return Metric(name, unit, meaning, values, labels)


def _round(
    name: str, unit: str, meaning: str, tag: str, read: Callable[[RoundRecord], float | Values | None], *labels: str
) -> Metric:
    """Of a round that this peer recorded; in Prometheus, the newest one."""

    def values(reading: Reading) -> Values:
        found = None if reading.tally.newest is None else read(reading.tally.newest)
        return found if isinstance(found, dict) else _known(found)

    return Metric(name, unit, f"Of the newest recorded round: {meaning}.", values, labels, tag)


def _total(name: str, unit: str, meaning: str, read: Callable[[Tally], float | Values], *labels: str) -> Metric:
    """Of all rounds in the peer's rounds.jsonl and what was put away of it, so that no restart sets it back."""

    def values(reading: Reading) -> Values:
        found = read(reading.tally)
        return found if isinstance(found, dict) else _known(found)

    return Metric(name, unit, f"Of all recorded rounds: {meaning}.", values, labels)


def _known(value: object) -> Values:
    """Nothing for what a daemon of another version does not tell."""
    return {(): float(value)} if isinstance(value, (int, float)) else {}


def _facts(status: Status) -> Values:
    return {tuple(str(status.get(key, "")) for key in ("run_name", "peer_id", "device")): 1.0}


def _credit(status: Status) -> Values:
    credit = status.get("credit", {})
    if not credit.get("complete"):  # a daemon that has just begun still counts
        return {}
    return {("this peer",): float(credit["samples"]), ("everybody",): float(credit["all"])}


def _members(status: Status) -> Values:
    return {(): 1.0 + len(status["peers"])} if "peers" in status else {}


def _behind(status: Status) -> Values:
    if "round" not in status:
        return {}
    return {(): float(max([0, *(peer["round"] - status["round"] for peer in status.get("peers", []))]))}


def _traffic(status: Status) -> Values:
    return {tuple(key.split("_", 1)): float(moved) for key, moved in status.get("traffic", {}).items()}


def _yes_or_no(key: str) -> Callable[[Status], Values]:
    return lambda status: {(): float(bool(status[key]))} if key in status else {}


def _parts(seconds: dict[str, float]) -> Values:
    return {(part,): value for part, value in seconds.items()}


METRICS: tuple[Metric, ...] = (
    Metric(
        "p2pllm_up",
        "0 or 1",
        "Whether the peer's daemon runs and answers.",
        lambda reading: {(): float(reading.status is not None)},
    ),
    _live(
        "p2pllm_peer_info",
        "always 1",
        "What the peer is: the run's name, the peer's id in the swarm, and the device that it computes on.",
        _facts,
        *("run_name", "peer_id", "device"),
    ),
    _live(
        "p2pllm_phase",
        "always 1",
        "The phase that the peer is in, as `p2pllm status` shows it.",
        lambda status: {(str(status["phase"]),): 1.0} if "phase" in status else {},
        "phase",
    ),
    _live(
        "p2pllm_paused", "0 or 1", "Whether the peer pauses, as its user or its settings want.", _yes_or_no("paused")
    ),
    _live(
        "p2pllm_trouble",
        "0 or 1",
        "Whether something keeps the peer from taking part, as a full disk does; `p2pllm status` says what.",
        _yes_or_no("trouble"),
    ),
    _live("p2pllm_uptime_seconds", "seconds", "Time since the daemon started.", "uptime_s"),
    _live("p2pllm_round", "rounds", "Committed rounds that the peer's state has behind it.", "round"),
    _live("p2pllm_run_rounds", "rounds", "Rounds of the whole run.", "rounds"),
    _live("p2pllm_behind_rounds", "rounds", "How many rounds the foremost living peer is ahead.", _behind),
    _live("p2pllm_members", "peers", "Living peers of the swarm that this one hears, itself included.", _members),
    _live("p2pllm_gathered_samples", "samples", "What the peer brings to the round under way so far.", "samples"),
    _live("p2pllm_swarm_gathered_samples", "samples", "What all living peers bring to it so far.", "gathered"),
    _live("p2pllm_wanted_samples", "samples", "At so many a round ends.", "wanted"),
    _live(
        "p2pllm_credit_samples",
        "samples",
        "What the swarm's log holds; of: this peer, everybody. It falls only if the swarm follows another branch.",
        _credit,
        "of",
    ),
    _live("p2pllm_tokens_per_second", "tokens/s", "What the peer computes.", "tokens_per_s"),
    _live(
        "p2pllm_swarm_tokens_per_second",
        "tokens/s",
        "What all living peers say that they compute.",
        "swarm_tokens_per_s",
    ),
    _live(
        "p2pllm_computed_tokens_total",
        "tokens",
        "What the peer computed since the daemon started, dropped rounds included.",
        "tokens",
    ),
    _live(
        "p2pllm_traffic_bytes_total",
        "bytes",
        "Payload since the daemon started; kind: control, updates, state; direction: sent, received.",
        _traffic,
        *("kind", "direction"),
    ),
    _live("p2pllm_micro_batch_samples", "samples", "Samples that the device computes at once.", "micro_batch"),
    _live(
        "p2pllm_worker_restarts_total",
        "restarts",
        "How often the compute process died and was started again, as for want of memory.",
        "worker_restarts",
    ),
    _live(
        "p2pllm_network_restarts_total", "restarts", "How often p2pd died and was started again.", "network_restarts"
    ),
    _round("p2pllm_last_round_number", "rounds", "its number", "", lambda record: record.round),
    _round(
        "p2pllm_last_round_timestamp_seconds",
        "seconds",
        "when this peer recorded it, Unix time",
        "",
        lambda record: record.unix_time,
    ),
    _round(
        "p2pllm_training_loss_nats",
        "nats/token",
        "training loss over all members",
        "loss/training",
        lambda record: record.loss,
    ),
    _round(
        "p2pllm_validation_loss_nats",
        "nats/token",
        "validation loss, or that of the newest round that has one",
        "loss/validation",
        lambda record: record.validation_loss,
    ),
    _round("p2pllm_learning_rate", "1", "learning rate", "round/learning_rate", lambda record: record.learning_rate),
    _round(
        "p2pllm_last_round_members",
        "peers",
        "peers whose updates are in it",
        "round/members",
        lambda record: len(record.members),
    ),
    _round(
        "p2pllm_last_round_samples",
        "samples",
        "samples of all members",
        "round/samples",
        lambda record: record.samples,
    ),
    _round(
        "p2pllm_last_round_own_samples",
        "samples",
        "samples that this peer computed for it",
        "round/own_samples",
        lambda record: sum(record.own_steps),
    ),
    _round(
        "p2pllm_last_round_attempts",
        "attempts",
        "exchanges until it was committed, 1 if none failed",
        "round/attempts",
        lambda record: record.attempts,
    ),
    _round(
        "p2pllm_last_round_tokens_per_second",
        "tokens/s",
        "tokens of all members, by its whole time",
        "round/tokens_per_s",
        lambda record: record.tokens / record.round_s if record.round_s > 0 else None,
    ),
    _round(
        "p2pllm_last_round_seconds",
        "seconds",
        "its whole time",
        "round/seconds",
        lambda record: record.round_s,
    ),
    _round(
        "p2pllm_last_round_part_seconds",
        "seconds",
        "its time by part, as compute, roster, exchange, vote; parts may overlap, and the rest of it was idle",
        "seconds",
        lambda record: _parts(record.seconds),
        "part",
    ),
    _round(
        "p2pllm_last_round_exchange_bytes",
        "bytes",
        "what this peer moved in its exchange; direction: sent, received",
        "bytes",
        lambda record: {("sent",): record.bytes_sent, ("received",): record.bytes_received},
        "direction",
    ),
    _total("p2pllm_recorded_rounds_total", "rounds", "how many there are", lambda tally: tally.rounds),
    _total(
        "p2pllm_recorded_own_samples_total",
        "samples",
        "samples that this peer computed for them",
        lambda tally: tally.own_samples,
    ),
    _total("p2pllm_recorded_tokens_total", "tokens", "tokens of all members", lambda tally: tally.tokens),
    _total("p2pllm_failed_attempts_total", "attempts", "exchanges that failed", lambda tally: tally.failed_attempts),
    _total("p2pllm_recorded_seconds_total", "seconds", "their whole time", lambda tally: tally.round_s),
    _total(
        "p2pllm_recorded_part_seconds_total",
        "seconds",
        "their time by part",
        lambda tally: _parts(tally.seconds),
        "part",
    ),
)


def curves(record: RoundRecord) -> dict[str, float]:
    """Tag -> number of one round, for tools that draw curves over rounds."""
    reading = Reading("", "", None, Tally(newest=record))
    return {
        "/".join((metric.tag, *labels)): value
        for metric in METRICS
        if metric.tag
        for labels, value in metric.read(reading).items()
    }


def as_markdown() -> Iterator[str]:
    """The table as lines of Markdown."""
    yield "| name | kind | unit | labels | in TensorBoard and W&B | meaning |"
    yield "|---|---|---|---|---|---|"
    for metric in METRICS:
        tag = "/".join((metric.tag, *(f"<{label}>" for label in metric.labels))) if metric.tag else ""
        cells = (f"`{metric.name}`", metric.kind, metric.unit, ", ".join(metric.labels), tag and f"`{tag}`")
        yield f"| {' | '.join((*cells, metric.meaning))} |"
