"""Neighbours: the peers that run on this machine beside each other share what its user allows, in equal parts.

What does not live here: what is shared (`participant`), and a month's traffic, which is counted together (`meter`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from p2pllm.settings import PeerSettings
from p2pllm_peers.folders import PeerFolder, RunFolder

LOOK_S = 5.0
"""How often is looked who runs: for so long at most peers take more together than they may."""


@dataclass(frozen=True)
class Part:
    """What one peer may take. Rates in Mbit/s; 0: all."""

    cpu_percent: float
    upload_mbit: float
    download_mbit: float

    @classmethod
    def of(cls, settings: PeerSettings, peers: int) -> Part:
        """Of so many peers that run here. Without a limit there is nothing to divide."""
        cpu = settings.cpu_percent / peers if settings.cpu_percent < 100 else 100.0
        return cls(cpu, settings.upload_mbit / peers, settings.download_mbit / peers)


def running_peers(home: Path) -> int:
    """How many run with this home, starting ones included; the one that asks is one of them."""
    locks = (home / "runs").glob("*/*/daemon.lock")
    peers = (PeerFolder(RunFolder(home, lock.parent.parent.name), lock.parent.name) for lock in locks)
    return max(1, sum(peer.running() is not None for peer in peers))


async def watch_neighbours(home: Path, changed: Callable[[int], None]) -> None:
    """Tell how many peers run here, whenever that has changed, for good."""
    before = 0
    while True:
        now = await asyncio.to_thread(running_peers, home)
        if now != before:
            changed(now)
            before = now
        await asyncio.sleep(LOOK_S)
