"""Pacing: how fast bulk may leave this machine or come to it, so that the line keeps room for what is small and urgent.

A modem queues what a line does not take at once, and heartbeats queue behind it. Who sends a little slower than the
line keeps that queue empty. What comes is slowed down by reading no faster than it may come: p2pd then lets the sender
wait. What does not live here: who sends (`streams`, `averaging`), and calls, which never wait.
"""

from __future__ import annotations

import asyncio

BURST_S = 0.05
"""What was not used of so many seconds may be sent at once."""


ON_THE_LINE = 1.045
"""Bytes on the line for one of payload: headers of Ethernet, IP and TCP (1514 bytes carry 1448), of TLS and yamux."""


class Pacer:
    """Shares a rate among all who send bulk, or all who receive it: first come, first served."""

    def __init__(self, mbit: float) -> None:
        """mbit: million bits a second on the line; 0: as fast as it goes. It may be changed at any time."""
        self.mbit = mbit
        self._free_at = 0.0

    def owe(self, count: int) -> float:
        """Seconds that `count` bytes, which move now, and all before them still take at the rate."""
        if not self.mbit:
            return 0.0
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - BURST_S) + count * ON_THE_LINE / (self.mbit * 1e6 / 8)
        return max(0.0, self._free_at - now)

    async def pay(self, count: int) -> None:
        """Wait as long as `count` bytes, which are about to move, and all before them take at the rate."""
        if self.mbit:
            await asyncio.sleep(self.owe(count))
