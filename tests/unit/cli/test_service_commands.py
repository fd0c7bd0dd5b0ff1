"""The commands around a service, on a system that does as it is told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from p2pllm_cli.disk import clean
from p2pllm_cli.service import service
from p2pllm_peers.folders import PeerFolder, RunFolder
from p2pllm_peers.service import Answer, Systemd

STATE = {"is-active": "inactive", "is-enabled": "enabled"}


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerFolder:
    """One that has taken part in a run."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("P2PLLM_HOME", str(tmp_path / "home"))

    def system(arguments: object) -> Answer:
        return Answer(0, next((said for verb, said in STATE.items() if verb in str(arguments)), ""))

    for module in ("service", "housekeeping"):
        monkeypatch.setattr(f"p2pllm_peers.{module}.manager", lambda: Systemd(system))
    found = RunFolder(tmp_path / "home", "ab" * 8).peer("volunteer")
    os.close(found.lock())
    (found.run.path / "manifest.json").write_text("{}")
    return found


def test_who_hands_a_running_peer_over_hears_how(peer: PeerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = peer.lock()
    shown = CliRunner().invoke(service, ["install"]).output
    assert "`p2pllm leave --run abababababababab --name volunteer`, then `p2pllm service install" in shown
    monkeypatch.setitem(STATE, "is-active", "active")
    assert "p2pllm leave" not in CliRunner().invoke(service, ["install"]).output
    os.close(lock)


def test_a_run_is_deleted_once_its_service_is_removed(peer: PeerFolder) -> None:
    CliRunner().invoke(service, ["install"], catch_exceptions=False)
    refused = CliRunner().invoke(clean, ["--run", "ab", "--yes"])
    assert "service remove --run abababababababab --name volunteer" in str(refused.exception)
    assert peer.path.exists()
    assert "no service any more" in CliRunner().invoke(service, ["remove"], catch_exceptions=False).output
    assert "Freed" in CliRunner().invoke(clean, ["--run", "ab", "--yes"], catch_exceptions=False).output
    assert not peer.run.path.exists()


def test_a_service_without_files_is_listed_and_removed(peer: PeerFolder) -> None:
    CliRunner().invoke(service, ["install"], catch_exceptions=False)
    shutil.rmtree(peer.run.home)
    assert "its files are gone" in CliRunner().invoke(service, ["status"], catch_exceptions=False).output
    assert "No peer" in CliRunner().invoke(service, ["status", "--run", "cd"], catch_exceptions=False).output
    assert "gone already" in CliRunner().invoke(service, ["remove"], catch_exceptions=False).output
    assert "No peer" in CliRunner().invoke(service, ["status"], catch_exceptions=False).output
