"""Links: how fast this peer exchanged with each of the others in the newest round.

What does not live here: counting bytes (`p2pllm.network.streams`), and others' links (`linkmap`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pllm.metrics import RoundRecord
from p2pllm.network.streams import Moved


class Links:
    """Bytes and rates by peer."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []

    def note(self, record: RoundRecord, moved: Mapping[str, Moved]) -> None:
        """A round was committed. moved: bytes of the streams with each peer until now."""
        now = {peer: streams.sent + streams.received for peer, streams in moved.items()}
        seconds = record.seconds.get("exchange", 0.0)
        if seconds > 0:
            known = [peer for peer in record.members if peer in now and peer in self._before]  # others fetched a state
            fresh = {peer: now[peer] - self._before[peer] for peer in known}
            self._rows = [
                {"peer": peer, "bytes": count, "mbit": round(count * 8e-6 / seconds, 3)}
                for peer, count in fresh.items()
                if count > 0
            ]
        self._before = now

    def rows(self) -> list[dict[str, Any]]:
        """{"peer", "bytes" both ways in the round, "mbit": million bits a second of its exchange}, by peer."""
        return self._rows
