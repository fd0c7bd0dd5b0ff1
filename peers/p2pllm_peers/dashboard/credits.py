"""Who contributed what, from the log of a peer that another process writes: counted on from where it was.

Signatures are not checked, as the daemon did before it took a round; `p2pllm credits` does it again.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from p2pllm.errors import P2PLLMError
from p2pllm.rounds.credit import Count, Tally
from p2pllm.rounds.log import RoundLog
from p2pllm_peers.folders import PeerFolder

PAUSE_S = 5.0
"""Least time between two counts."""

_IDLE_TIMES = 20
"""A long log takes time to open; so many times as long it is left alone, so that counting takes 5 % of a core."""

Rows = list[dict[str, Any]]


class CreditBook:
    """The credits of one peer's run. Not for several threads at once."""

    def __init__(self, peer: PeerFolder) -> None:
        self._peer = peer
        self._identity: tuple[str, str] | None = None  # of the run: id, founder
        self._count = Count()
        self._next = 0.0
        self.rows: Rows = []

    @property
    def is_due(self) -> bool:
        """Whether it is time to count again, if there is anything new."""
        return time.monotonic() >= self._next

    def update(self) -> bool:
        """Count what is new; whether that changed anything. A log that cannot be read now is read the next time."""
        begin = time.monotonic()
        try:
            changed = self._look()
        except (P2PLLMError, OSError):
            changed = False
        now = time.monotonic()
        self._next = now + max(PAUSE_S, _IDLE_TIMES * (now - begin))
        return changed

    def _look(self) -> bool:
        if self._identity is None:
            loaded = self._peer.run.load()
            if loaded is None:
                return False
            self._identity = loaded[0].run_id, loaded[0].founder
        with closing(RoundLog(self._peer.path / "log", *self._identity, read_only=True)) as log:
            before = self._count.head
            for _ in self._count.go_on(log):
                pass
        self.rows = _rows(self._count.tally())
        return self._count.head != before


def _rows(found: Tally) -> Rows:
    return [
        {
            "peer": peer,
            "samples": credit.samples,
            "share": round(credit.samples / max(1, found.samples), 4),
            "rounds": credit.rounds,
            "last": credit.last,
        }
        for peer, credit in found.credits.items()
    ]
