"""Update: what one peer brings to a round, how it travels, and Compute, the process that makes it, as the loop sees it.

What does not live here: how updates are computed (the programs, `training`) and what becomes of them (`round`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from p2pllm.averaging import Payload
from p2pllm.rounds.record import Claim, Head


@dataclass(frozen=True)
class Update:
    """What this peer contributes to a round."""

    samples: int
    loss: float  # mean training loss, nats a token
    vector: np.ndarray  # float32, shape (parameters,) or that of a fragment; the worker may write there again

    def kept(self) -> Update:
        """The same in memory of its own, for a later round."""
        return Update(self.samples, self.loss, self.vector.copy())


@dataclass(frozen=True)
class Packed:
    """An update as it travels, with what we claim for it in the round after one head."""

    head: Head
    claim: Claim
    payload: Payload
    update: Update

    def kept(self) -> Packed:
        """The same in memory of its own. Where the payload is not the update itself, nobody needs that any more."""
        if self.payload is not self.update.vector:
            return self
        update = self.update.kept()
        return replace(self, update=update, payload=update.vector)


def joined(*parts: Update | None) -> Update | None:
    """Their mean, weighed by samples, in memory of its own if there are several; None if there is none.

    A part that was computed for a round that was committed without it is on an older state: a little stale, not lost.
    """
    updates = [update for update in parts if update is not None]
    if len(updates) < 2:
        return updates[0] if updates else None
    samples = sum(update.samples for update in updates)
    vector = np.zeros_like(updates[0].vector)
    for update in updates:
        vector += update.vector * np.float32(update.samples / samples)
    return Update(samples, sum(update.loss * update.samples for update in updates) / samples, vector)


class Compute(Protocol):
    """The process that computes gradients, as the loop sees it."""

    @property
    def ready(self) -> bool:
        """The process is up and has a model."""
        ...

    @property
    def samples(self) -> int:
        """Samples gathered in the round that was begun."""
        ...

    @property
    def own_steps(self) -> list[int]:
        """Samples of each micro-batch of the update that was finished last."""
        ...

    async def begin(self, round_number: int) -> None:
        """Take the parameters as they are now and work on this round; who went on already keeps what it did since."""
        ...

    async def finish(self, go_on: bool = False) -> Update | None:
        """End the current step and hand over the update; None if there is none.

        go_on: work on the next round at once, from the worker's own parameters; `begin` follows when the shared ones
        have moved.
        """
        ...

    async def abandon(self) -> None:
        """Drop what was gathered; returns when the process no longer reads the parameters."""
        ...

    async def hold(self, held: bool) -> None:
        """Compute nothing from now on, and keep what was gathered; or, if not `held`, go on."""
        ...

    async def park(self) -> None:
        """Give the process's memory back until the next `begin`; nothing may be gathered. May be asked again."""
        ...

    async def evaluate(self) -> float | None:
        """Validation loss of the parameters as they are now, nats a token; None if it failed."""
        ...
