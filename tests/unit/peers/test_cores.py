"""How many cores a container leaves of the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pllm_peers import cgroups, cores
from p2pllm_peers.cores import quotas, usable_cores


def test_every_group_above_us_counts(tmp_path: Path) -> None:
    ours, root = tmp_path / "cgroup", tmp_path / "root"
    ours.write_text("0::/slice/peer.service\n")
    (root / "slice" / "peer.service").mkdir(parents=True)
    (root / "slice" / "peer.service" / "cpu.max").write_text("max 100000\n")
    (root / "slice" / "cpu.max").write_text("150000 100000\n")
    assert quotas(ours, root) == [1.5]


@pytest.mark.parametrize(("quota", "found"), [("200000", [2.0]), ("-1", [])])
def test_in_a_container_of_the_old_kind(tmp_path: Path, quota: str, found: list[float]) -> None:
    ours, root = tmp_path / "cgroup", tmp_path / "root"
    ours.write_text("5:cpu,cpuacct:/docker/12ab\n4:memory:/docker/12ab\n0::/\n")
    (root / "cpu").mkdir(parents=True)
    (root / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert quotas(ours, root) == found


def test_the_fewest_of_quota_and_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(cgroups, "OURS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cores, "cores_here", lambda: frozenset(range(64)))
    assert usable_cores() == 64
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert usable_cores() == 2
    monkeypatch.setattr(cores, "cores_here", lambda: frozenset({3}))
    assert usable_cores() == 1
