"""CPU budgets: every peer gets a fixed share of a core, for all its processes together, through a cgroup.

A quota, not a weight: what one peer leaves unused speeds up nobody else, as between real machines. What does not
live here: which share a peer gets (`scenario`) and undoing the groups after a crash (`claims`).
"""

from __future__ import annotations

import os
from pathlib import Path

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.claims import Claims

ROOT = Path("/sys/fs/cgroup")

PERIOD_US = 10_000
"""A peer with half a core runs 5 ms, then stands still for 5 ms. The kernel's default of 100 ms would add up to 50 ms
to every answer, which a slower machine does not do; below 10 ms the quota becomes inexact."""

_JOIN = 'for group in $0; do echo $$ > "$group/cgroup.procs" || exit 1; done; exec "$@"'


def why_not() -> str:
    """What keeps this machine from giving budgets; "" if nothing does."""
    if os.geteuid() != 0:
        return "CPU budgets need root"
    if not _version_1() and "cpu" not in _read(ROOT / "cgroup.controllers").split():
        return f"CPU budgets need the cgroup controller cpu under {ROOT}"
    return ""


class Budgets:
    """The cgroups of the peers of one lab."""

    def __init__(self, claims: Claims) -> None:
        """Makes nothing yet. Raises RunError if this machine cannot."""
        if reason := why_not():
            raise RunError(f"{reason}.")
        self._claims = claims
        self._parents = [ROOT / kind / claims.name() for kind in ("cpu", "cpuacct")]
        if not _version_1():
            self._parents = [ROOT / claims.name()]
        elif self._parents[0].parent.resolve() == self._parents[1].parent.resolve():
            del self._parents[1]

    def start(self, peers: list[str]) -> None:
        """Make a group for each peer, without a limit so far."""
        for parent in self._parents:
            self._make(parent)
            if not _version_1():
                _write(ROOT / "cgroup.subtree_control", "+cpu")
                _write(parent / "cgroup.subtree_control", "+cpu")
            for peer in peers:
                self._make(parent / peer)

    def limit(self, peer: str, cores: float) -> None:
        """Give a peer this share of one core from now on; 0 lifts the limit."""
        group = self._parents[0] / peer
        period = max(PERIOD_US, round(1000 / cores)) if cores else PERIOD_US  # the kernel's least quota is 1 ms
        quota = round(cores * period)
        if _version_1():
            _write(group / "cpu.cfs_period_us", str(period))
            _write(group / "cpu.cfs_quota_us", str(quota if cores else -1))
        else:
            _write(group / "cpu.max", f"{quota if cores else 'max'} {period}")

    def prefix(self, peer: str) -> list[str]:
        """What to put before a command so that it, and whatever it starts, is in the peer's group; the pid stays."""
        return ["sh", "-c", _JOIN, " ".join(str(parent / peer) for parent in self._parents)]

    def pids(self, peer: str) -> list[int]:
        """All processes of a peer."""
        return [int(pid) for pid in _read(self._parents[0] / peer / "cgroup.procs").split()]

    def cpu_s(self, peer: str) -> float:
        """CPU seconds that a peer's processes have used."""
        if _version_1():
            return int(_read(self._parents[-1] / peer / "cpuacct.usage") or 0) / 1e9
        stat = dict(line.split() for line in _read(self._parents[0] / peer / "cpu.stat").splitlines())
        return int(stat.get("usage_usec", 0)) / 1e6

    def _make(self, group: Path) -> None:
        self._claims.note("cgroup", str(group))
        try:
            group.mkdir()
        except OSError as error:
            raise RunError(f"The cgroup {group} cannot be made: {error.strerror}; is it mounted for writing?") from None


def _version_1() -> bool:
    return (ROOT / "cpu" / "cpu.cfs_quota_us").exists() or (ROOT / "cpu" / "tasks").exists()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # a group that is gone


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise RunError(f"{path} does not take {text!r}: {error.strerror}; is another program limiting us?") from None
