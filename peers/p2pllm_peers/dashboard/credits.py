"""Who contributed what, from the log of a peer that another process writes: counted on from where it was.

Signatures are not checked, as the daemon did before it took a round; `p2pllm credits` does it again.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from p2pllm.errors import P2PLLMError
from p2pllm.rounds.credit import Credit
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.record import Head
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
        self._counted: Head = (0, b"")
        self._credits: dict[str, Credit] = {}
        self._samples = 0
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
            changed = self._count()
        except (P2PLLMError, OSError):
            changed = False
        now = time.monotonic()
        self._next = now + max(PAUSE_S, _IDLE_TIMES * (now - begin))
        return changed

    def _count(self) -> bool:
        if self._identity is None:
            loaded = self._peer.run.load()
            if loaded is None:
                return False
            self._identity = loaded[0].run_id, loaded[0].founder
        with closing(RoundLog(self._peer.path / "log", *self._identity, read_only=True)) as log:
            before = self._counted
            if before[0] and not log.has(before):  # the branch became another one
                self._counted, self._credits, self._samples = (0, b""), {}, 0
            for round_, record in enumerate(log.records(self._counted[0] + 1), self._counted[0] + 1):
                self._samples += 0 if record is None else record.body.samples
                for claim in () if record is None else record.body.members:
                    credit = self._credits.setdefault(claim.peer, Credit())
                    credit.samples += claim.samples
                    credit.rounds += 1
                    credit.last = round_
                self._counted = (round_, log.digest(round_) or b"")
        self.rows = self._ranked()
        return self._counted != before

    def _ranked(self) -> Rows:
        ranked = sorted(self._credits.items(), key=lambda item: (-item[1].samples, item[0]))
        return [
            {
                "peer": peer,
                "samples": credit.samples,
                "share": round(credit.samples / max(1, self._samples), 4),
                "rounds": credit.rounds,
                "last": credit.last,
            }
            for peer, credit in ranked
        ]
