"""Machines: budgets that hold, disks that are full alone, and what is said where this machine cannot make them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p2pllm.errors import RunError, UsageError
from p2pllm.manifest import RunDraft
from p2pllm_peers.lab.budgets import Budgets
from p2pllm_peers.lab.budgets import why_not as no_budgets
from p2pllm_peers.lab.evidence import Strike
from p2pllm_peers.lab.faults import Faults
from p2pllm_peers.lab.machines import FILLER, Machines
from p2pllm_peers.lab.network import links
from p2pllm_peers.lab.scenario import Churn, Event, Link, Peers, Scenario
from p2pllm_peers.lab.swarm import Swarm

LINE = Link(up_mbit=50, down_mbit=50, delay_ms=5)

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def scenario(**fields) -> Scenario:
    return Scenario(**{"name": "small", "run": RunDraft(), "duration_s": 60, **fields})


def with_lines(**fields) -> Scenario:
    return scenario(links={"l": LINE}, peers=(Peers(count=2, link="l"),), **fields)


@root
@pytest.mark.skipif(no_budgets() != "", reason=no_budgets())
def test_a_busy_peer_gets_its_share_and_no_more(tmp_path: Path) -> None:
    busy = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    with Machines(scenario(peers=(Peers(cores=0.3),)), tmp_path) as machines:
        machines.limit("peer", 0.3)
        before, begin = machines.cpu_s("peer"), time.monotonic()
        children = (
            f"import subprocess, sys\nfor p in [subprocess.Popen([sys.executable, '-c', {busy!r}])] * 2: p.wait()"
        )
        subprocess.run([*machines["peer"].prefix, sys.executable, "-c", children], check=True)
        share = (machines.cpu_s("peer") - before) / (time.monotonic() - begin)
    assert 0 < share < 0.33, "children count, too, and nothing goes beyond the budget"
    assert machines.left_over == []


@root
def test_a_disk_of_its_own_is_full_alone_and_its_files_stay(tmp_path: Path) -> None:
    with Machines(scenario(peers=(Peers(disk_mb=2),)), tmp_path) as machines:
        swarm = Swarm(machines, RunDraft(), _settings(tmp_path))
        faults, home = Faults(swarm, machines, tmp_path, seed=0), machines["peer"].home
        (home / "kept").write_text("before")
        faults.carry_out(Strike(at_s=0, do="fill_disk", peer="peer"), print)
        with pytest.raises(OSError, match="No space left"):
            (home / "more").write_bytes(bytes(5000))
        faults.carry_out(Strike(at_s=1, do="free_disk", peer="peer"), print)
        (home / "more").write_bytes(bytes(5000))
        faults.carry_out(Strike(at_s=2, do="fill_disk", peer="peer"), print)
    assert (home / "kept").read_text() == "before"
    assert not (home / FILLER).exists() and not home.is_mount()
    assert machines.left_over == []


def test_what_needs_a_link_is_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cut, but no links"):
        Machines(scenario(peers=(Peers(),), events=(Event(at_s=1, do="cut", peer="peer"),)), tmp_path)


def test_without_root_links_are_left_out_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "why_not", lambda: "links need root")
    with Machines(with_lines(), tmp_path) as machines:
        assert machines["peer-0"].host == "127.0.0.1"
        assert machines.notes == ["All peers are on loopback with no shaping: links need root."]
        assert machines.counters() == {}
    event = Event(at_s=1, do="partition", groups=(("peer-0",), ("peer-1",)))
    for needy in ({"events": (event,)}, {"churn": Churn(faults_per_hour=9, kinds=("cut",))}):
        with pytest.raises(UsageError, match=r"small has (partition|cut), for which links need root\.$"):
            Machines(with_lines(**needy), tmp_path)


def test_a_group_that_cannot_be_made_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pllm_peers.lab.budgets.why_not", lambda: "CPU budgets need root")
    with pytest.raises(RunError, match=r"^CPU budgets need root\.$"):
        Budgets(None)  # type: ignore[arg-type]  # it does not come to use them


def test_a_corrupted_file_differs_in_one_bit(tmp_path: Path) -> None:
    with Machines(scenario(peers=(Peers(),)), tmp_path) as machines:
        swarm = Swarm(machines, RunDraft(), _settings(tmp_path))
        peer = swarm.peers["peer"]
        peer._facts = {"run_id": "ab" * 32, "name": "founder"}
        assert peer.folder is not None
        state = peer.folder.path / "state"
        state.mkdir(parents=True)
        for number in (1, 2):
            (state / f"{number}.safetensors").write_bytes(bytes(1000))
            os.utime(state / f"{number}.safetensors", (number, number))
        strike = Strike(at_s=0, do="corrupt", peer="peer", args={"file": "state/*.safetensors"})
        Faults(swarm, machines, tmp_path, seed=3).carry_out(strike, print)
        assert (state / "1.safetensors").read_bytes() == bytes(1000), "only the newest"
        assert sum(byte.bit_count() for byte in (state / "2.safetensors").read_bytes()) == 1
        with pytest.raises(RunError, match=r"peer has no file nothing\.\* to corrupt"):
            Faults(swarm, machines, tmp_path, 0).carry_out(
                strike.model_copy(update={"args": {"file": "nothing.*"}}), print
            )


def _settings(tmp_path: Path):
    from p2pllm.settings import PeerSettings

    return PeerSettings(cache=tmp_path / "cache")
