"""Exchange: what a round needs of averaging, whatever the run's strategy.

What does not live here: the exchanges that there are (`dense`, `sparse_exchange`) and which one a run has
(`strategies`); who is in a group and when (`rounds`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from p2pllm.averaging.group import ExchangeResult, Group

Payload = NDArray[np.float32] | bytes
"""What travels of an update."""


def view_of(payload: Payload | bytearray | memoryview) -> memoryview:
    """The bytes of what travels, or of an aggregate; no copy."""
    return payload.data.cast("B") if isinstance(payload, np.ndarray) else memoryview(payload)


def in_one(reasons: Iterable[str]) -> str:
    """One sentence of several; empty if there is none."""
    clauses = [reason.rstrip(".") for reason in dict.fromkeys(reasons) if reason]
    return "; ".join(clauses) + "." * bool(clauses)


class Exchange(ABC):
    """From one peer's update to the aggregate of a group."""

    keeps = False
    """What of an update did not get into a round is kept here, so nobody else has to keep it."""

    async def start(self) -> None:
        """Answer other members."""
        return

    def pack(self, update: NDArray[np.float32]) -> Payload:
        """What travels of an update, float32 (layout.size,), and what its member signs: here the update itself.

        What was packed before counts as lost, unless it was said to be `delivered`.
        """
        return update

    def delivered(self) -> None:
        """What was packed last is in a committed round."""
        return

    def close(self) -> None:
        """Keep what is this peer's own for its next session. Raises StateError if the disk does not take it."""
        return

    @abstractmethod
    async def run(self, group: Group, payload: Payload, deadline: float) -> ExchangeResult:
        """Come to the aggregate of the group within `deadline` seconds; failures of peers are results.

        Raises ValueError if the group or the payload is unusable.
        """
