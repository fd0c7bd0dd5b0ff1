"""What a baseline's process hears, says and records, as lines of JSON.

    in       the order (the fields of `Order`); {"contact": ...} to all but the first; {"go": seconds}
    out      {"event": "contact", "contact": ...} from the first; {"event": "ready"}
    file     a `Row` for each update of its model

Imports nothing heavy, since `fleet` needs it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Order:
    """What one process shall do. `host`: its machine's address. `rows`: the file to write."""

    draft: dict[str, Any]
    rank: int
    peers: int
    host: str
    cache: str
    micro_batch: int
    rows: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One update of one peer's model. `tokens`: this peer's own in it. Losses in nats a token."""

    unix_time: float
    round: int
    tokens: int
    loss: float  # mean over `tokens`
    validation_loss: float | None
