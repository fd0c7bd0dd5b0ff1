"""What each field of a line of rounds.jsonl means, which `p2pllm metrics jsonl` prints: a table for METRICS.md.

What does not live here: the record itself (`metrics`), and what other tools get of it (`metric_names`).
"""

from __future__ import annotations

from collections.abc import Iterator

FIELDS: dict[str, tuple[str, str]] = {
    "round": ("rounds", "Rounds committed, this one included."),
    "unix_time": ("seconds", "When this peer recorded it, Unix time."),
    "samples": ("samples", "Of all members."),
    "tokens": ("tokens", "Of all members."),
    "members": ("samples", "Object: peer id -> samples that it brought, in the order of the roster."),
    "loss": ("nats/token", "Training loss over all members."),
    "validation_loss": ("nats/token", "Null where the round was not validated."),
    "learning_rate": ("1", "Of the round."),
    "record_digest": ("hex", "BLAKE3 of the round's record in the log."),
    "aggregate_digest": ("hex", "BLAKE3 of what the members' updates became together."),
    "state_digest": ("hex", "BLAKE3 of the state after it, the same at every peer."),
    "attempts": ("attempts", "Exchanges until it was committed, 1 if none failed."),
    "own_steps": ("samples", "List: those of each of this peer's micro-batches."),
    "bytes_sent": ("bytes", "By this peer in the exchange."),
    "bytes_received": ("bytes", "By this peer in the exchange."),
    "seconds": (
        "seconds",
        "Object: part of the round -> its time; compute, roster, exchange, vote, outer_step, digest, store, log, "
        "validation, and what these consist of. Parts may overlap.",
    ),
    "round_s": ("seconds", "Since this peer was at the round's start; what `seconds` does not explain was idle."),
    "failures": (
        "",
        "List: what failed here in the round's attempts, also where one of them committed; a sentence each.",
    ),
    "traffic": (
        "bytes",
        "Object: payload since the daemon started; control, updates and state, each with _sent and _received.",
    ),
}
"""Name -> (unit, meaning) of every field, in the order of a line."""


def fields_as_markdown() -> Iterator[str]:
    """The table as lines of Markdown."""
    yield "| field | unit | meaning |"
    yield "|---|---|---|"
    for name, (unit, meaning) in FIELDS.items():
        yield f"| `{name}` | {unit} | {meaning} |"
