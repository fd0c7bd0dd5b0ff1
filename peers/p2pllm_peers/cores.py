"""Cores: how many of this machine's this process may use. What others leave of them is `crew`."""

from __future__ import annotations

import os
from pathlib import Path

from p2pllm_peers.cgroups import groups, read


def cores_here() -> frozenset[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def usable_cores() -> float:
    """On how many cores' time this process can count: those it may run on, and no more than a container's quota.

    `docker run --cpus=1.5` gives 1.5, whatever the machine has.
    """
    return min([float(len(cores_here())), *quotas()])


def quotas(ours: Path | None = None, root: Path | None = None) -> list[float]:
    """Cores' worth of time that each control group which holds us allows, of those that have a limit."""
    found = []
    for group, version in groups("cpu", ours, root):
        if version == 1:
            limits = [read(group / "cpu.cfs_quota_us"), read(group / "cpu.cfs_period_us")]
        else:
            limits = read(group / "cpu.max").split()
        if len(limits) == 2 and all(limit.isdecimal() for limit in limits) and int(limits[1]):
            found.append(int(limits[0]) / int(limits[1]))  # "max" and -1 are no limits
    return found
