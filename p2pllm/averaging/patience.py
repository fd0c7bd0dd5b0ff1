"""Patience: how long a member of an exchange may be silent, from how long members lately were and came back.

What does not live here: who is silent (`vigil`, `gather`), and what becomes of it (`rounds`).
"""

from __future__ import annotations

from collections import deque

FACTOR, FLOOR_S, CAP_S = 2.0, 3.0, 20.0
"""A member has failed after so many times the longest silence of the last exchanges, within these bounds."""

MEASURED = 16
"""Exchanges that count."""


class Patience:
    """Seconds of silence after which a member has failed, in the next exchange."""

    def __init__(self, first_s: float) -> None:
        """first_s: where nothing was measured yet."""
        self._first_s = first_s
        self._silences = deque[float](maxlen=MEASURED)

    @property
    def seconds(self) -> float:
        """At least FLOOR_S and at most CAP_S once something was measured."""
        if not self._silences:
            return self._first_s
        return min(max(FACTOR * max(self._silences), FLOOR_S), CAP_S)

    def note(self, silence_s: float) -> None:
        """Somebody came back after so long: the longest silence of an exchange, or one that we gave up too early."""
        self._silences.append(silence_s)
