"""What a container leaves of the machine's memory."""

from pathlib import Path

import psutil

from p2pllm_peers import cgroups
from p2pllm_peers.doctor import memory

GIB = 1 << 30


def group(folder: Path, limit: str, used: int, droppable: int, names: tuple[str, ...]) -> None:
    """One control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {droppable}\nactive_file 7\n")


def test_every_group_above_us_counts(tmp_path: Path) -> None:
    ours, root = tmp_path / "cgroup", tmp_path / "root"
    ours.write_text("0::/slice/peer.service\n")
    group(root / "slice" / "peer.service", "max", GIB, 0, memory._VERSION_2)
    group(root / "slice", str(3 * GIB), 2 * GIB, GIB // 2, memory._VERSION_2)
    assert memory._left_by_limits(ours, root) == [GIB + GIB // 2]


def test_in_a_container_the_root_is_its_own_group(tmp_path: Path) -> None:
    ours, root = tmp_path / "cgroup", tmp_path / "root"
    ours.write_text("5:cpu,cpuacct:/docker/12ab\n4:memory:/docker/12ab\n0::/\n")
    group(root / "memory", str(2 * GIB), GIB, 0, memory._VERSION_1)
    assert memory._left_by_limits(ours, root) == [GIB]


def test_without_control_groups_it_is_the_machines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cgroups, "OURS", tmp_path / "none")
    assert memory.free_memory() <= psutil.virtual_memory().total
    assert memory._left_by_limits(tmp_path / "none", tmp_path) == []


def test_a_limit_that_is_passed_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    ours = tmp_path / "cgroup"
    ours.write_text("0::/\n")
    group(tmp_path, str(GIB), 2 * GIB, 0, memory._VERSION_2)
    monkeypatch.setattr(cgroups, "OURS", ours)
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    assert memory.free_memory() == 0
