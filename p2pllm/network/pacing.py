"""Pacing: how fast bulk may leave this machine, so that the line keeps room for what is small and urgent.

A modem queues what a line does not take at once, and heartbeats queue behind it. Who sends a little slower than the
line keeps that queue empty. What does not live here: who sends (`streams`, `averaging`), and calls, which never wait.
"""

from __future__ import annotations

import asyncio

BURST_S = 0.05
"""What was not used of so many seconds may be sent at once."""


class Pacer:
    """Shares an upload rate among all who send bulk: first come, first served."""

    def __init__(self, mbit: float) -> None:
        """mbit: million bits a second of payload; 0: as fast as the line takes it. It may be changed at any time."""
        self.mbit = mbit
        self._free_at = 0.0

    async def pay(self, count: int) -> None:
        """Wait as long as `count` bytes, which were just handed over, and all before them take at the rate."""
        if not self.mbit:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - BURST_S) + count / (self.mbit * 1e6 / 8)
        await asyncio.sleep(max(0.0, self._free_at - now))
