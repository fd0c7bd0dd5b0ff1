"""What took the machine away from a lab while it measured: other programs, or the host of a virtual machine.

Where others take the CPU no budget is kept, and times, speeds and recoveries are theirs as much as the swarm's. A run
says so. What does not live here: what to conclude (`reporting.verdict`).
"""

from __future__ import annotations

import time

import psutil

from p2pllm_peers.lab.machines import Machines

CORES = 0.25
"""A run says so if it lost that many cores; what the kernel itself does for the links stays below."""


class Disturbance:
    """Counts from when it is made."""

    def __init__(self, machines: Machines, of_children: bool = False) -> None:
        """of_children: what the lab's own children take that are no peers is the lab's, once they have ended."""
        self._machines = machines
        self._of_children = of_children
        self._began = self._now()

    def notes(self) -> list[str]:
        """A sentence for everything that took so much that times and speeds do not hold."""
        if not self._machines.budgeted:
            return []
        wall, busy, stolen, ours = (now - then for now, then in zip(self._now(), self._began, strict=True))
        taken = {
            "Other programs used": (busy - ours) / max(wall, 1e-3),
            "The host of this virtual machine withheld": stolen / max(wall, 1e-3),
        }
        return [
            f"{who} {cores:.2f} of {psutil.cpu_count()} cores meanwhile: times and speeds do not hold."
            for who, cores in taken.items()
            if cores >= CORES
        ]

    def _now(self) -> tuple[float, float, float, float]:
        """Seconds: wall; CPU of the whole machine; withheld by its host; of the peers, the links and the lab."""
        host, own = psutil.cpu_times(), psutil.Process().cpu_times()
        ours = sum(self._machines.cpu_s(name) or 0.0 for name in self._machines.specs)
        ours += self._machines.emulator().cpu_s + own.user + own.system
        if self._of_children:
            ours += own.children_user + own.children_system
        busy = host.user + host.nice + host.system + getattr(host, "softirq", 0.0)
        return time.monotonic(), busy, getattr(host, "steal", 0.0), ours
