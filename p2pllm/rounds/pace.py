"""Deadline: how long a phase of a round may take, from how long it took.

Nobody has to guess one: it is a multiple of the slowest of the last rounds, between a floor and a cap. What does not
live here: waiting (`roster`, `round`).
"""

from __future__ import annotations

from collections import deque

MEASURED_ROUNDS = 16


class Deadline:
    """Seconds that one phase may take at one peer."""

    def __init__(self, factor: float, floor: float, cap: float, first: float) -> None:
        """factor: times the slowest of the last MEASURED_ROUNDS. first: where nothing was measured yet."""
        self._factor, self._floor, self._cap, self._first = factor, min(floor, cap), cap, first
        self._measured = deque[float](maxlen=MEASURED_ROUNDS)

    @property
    def seconds(self) -> float:
        """The deadline for the next round."""
        slowest = self._factor * max(self._measured) if self._measured else self._first
        return min(max(slowest, self._floor), self._cap)

    def note(self, seconds: float) -> None:
        """It took so long, and went well."""
        self._measured.append(seconds)

    def missed(self) -> None:
        """It was not enough: the next one is longer by the factor."""
        self._measured.append(self.seconds)
