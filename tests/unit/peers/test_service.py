"""The service: what is written for systemd and launchd, what is asked of them, and what is left when they refuse."""

from __future__ import annotations

import plistlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from p2pllm.errors import DaemonError
from p2pllm_peers.folders import PeerFolder, RunFolder
from p2pllm_peers.service import Answer, Launchd, Manager, Systemd, command_of

Refuse = Callable[[Sequence[str]], bool]


class System:
    """Answers as a system that knows services, and notes what it was asked."""

    def __init__(self, refuses: str = "", version: int = 255) -> None:
        self.asked: list[list[str]] = []
        self.refuses, self.version = refuses, version
        self.loaded = False  # of launchd

    def __call__(self, arguments: Sequence[str]) -> Answer:
        self.asked.append(list(arguments))
        if "print" in arguments and not self.loaded:
            return Answer(113, "Could not find service")
        if "bootstrap" in arguments or "bootout" in arguments:
            self.loaded = "bootstrap" in arguments and self.refuses != "bootstrap"
        if self.refuses and self.refuses in arguments:
            return Answer(1, "first line\nFailed to connect to bus.")
        return Answer(0, f"systemd {self.version} (test)\nactive\n\tstate = running")


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerFolder:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    found = RunFolder(tmp_path / "a $home %h", "5a" * 32).peer("volunteer")
    found.path.mkdir(parents=True)
    return found


@pytest.mark.parametrize("kind", [Systemd, Launchd])
def test_it_comes_and_goes(kind: type[Manager], peer: PeerFolder) -> None:
    system = System()
    manager = kind(system)
    assert manager.installed() == []
    assert manager.install(peer) == ""
    assert manager.file(peer).exists() and manager.installed() == [peer]
    assert "running" in manager.state(peer) or "active" in manager.state(peer)
    manager.remove(peer)
    assert not manager.file(peer).exists()
    words = [word for asked in system.asked for word in asked]
    for word in ("enable", "disable") if kind is Systemd else ("bootstrap", "bootout"):
        assert word in words
    with pytest.raises(DaemonError, match="is no service"):
        manager.remove(peer)


@pytest.mark.parametrize(("kind", "word"), [(Systemd, "daemon-reload"), (Systemd, "enable"), (Launchd, "bootstrap")])
def test_a_system_that_refuses_leaves_all_as_it_was(kind: type[Manager], word: str, peer: PeerFolder) -> None:
    manager = kind(System(refuses=word))
    with pytest.raises(DaemonError, match=r"Failed to connect to bus; use `p2pllm join --detach` instead\."):
        manager.install(peer)
    assert not manager.file(peer).exists()
    manager.file(peer).write_bytes(b"the one before")
    with pytest.raises(DaemonError):
        manager.install(peer)
    assert manager.file(peer).read_bytes() == b"the one before"


def test_what_only_root_may_is_left_to_the_user(peer: PeerFolder) -> None:
    assert "sudo loginctl enable-linger" in Systemd(System(refuses="enable-linger")).install(peer)


def test_a_peer_that_runs_is_not_started_twice(peer: PeerFolder) -> None:
    system = System()
    peer.lock()
    Systemd(system).install(peer)
    assert not any("--now" in asked for asked in system.asked)


@pytest.mark.parametrize(("version", "delay"), [(252, "RestartSec=60"), (255, "RestartMaxDelaySec=600")])
def test_systemd_takes_the_unit(peer: PeerFolder, version: int, delay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PLLM_CACHE", 'a "cache" of 100 % \\')
    manager = Systemd(System(version=version))
    manager.install(peer)
    text = manager.file(peer).read_text()
    assert "OOMPolicy=continue\n" in text, "else the kernel's end of a worker is the daemon's, too"
    assert delay in text and "Restart=on-failure" in text and "%%h" in text and "$$home" in text
    assert 'Environment="P2PLLM_CACHE=a \\"cache\\" of 100 %% \\\\"' in text
    analyze = shutil.which("systemd-analyze")
    if analyze is None or version > 252:
        return
    done = subprocess.run(
        [analyze, "--user", "--man=no", "verify", str(manager.file(peer))], capture_output=True, text=True, check=False
    )
    about = [line for line in done.stderr.splitlines() if manager.label(peer) in line]
    assert not about, done.stderr


def test_the_agent_of_launchd(peer: PeerFolder) -> None:
    manager = Launchd(System())
    manager.install(peer)
    agent = plistlib.loads(manager.file(peer).read_bytes())
    assert agent["ProgramArguments"][4:] == command_of(peer) and agent["Label"] == manager.file(peer).stem
    assert agent["KeepAlive"] == {"SuccessfulExit": False} and agent["RunAtLoad"] is True


def test_what_it_runs_is_a_command_that_there_is(peer: PeerFolder) -> None:
    python, *rest = command_of(peer)
    assert python == sys.executable
    done = subprocess.run([python, *rest[:3], "--help"], capture_output=True, text=True, check=True)
    assert all(option in done.stdout for option in rest[3:] if option.startswith("--"))


@pytest.mark.parametrize("kind", [Systemd, Launchd])
def test_one_whose_files_are_gone_is_still_seen_and_removed(kind: type[Manager], peer: PeerFolder) -> None:
    manager = kind(System())
    manager.install(peer)
    shutil.rmtree(peer.run.home)
    for foreign in ("other", "p2pllm-odd"):
        (manager.folder / f"{foreign}{manager.suffix}").write_bytes(b"\xff[Service]\nExecStart=/bin/true\n")
    (found,) = manager.installed()
    assert found == peer
    manager.remove(found)
    assert manager.installed() == []


def test_an_agent_that_launchd_has_or_lost_is_no_error(peer: PeerFolder) -> None:
    system = System(refuses="bootstrap")
    manager = Launchd(system)
    system.loaded = True
    assert "from your next login" in manager.install(peer)
    system.loaded, system.refuses = False, "bootout"
    manager.remove(peer)
    assert not manager.file(peer).exists()


def test_a_name_that_units_do_not_take_is_refused(peer: PeerFolder) -> None:
    named = peer.run.peer("josé")
    with pytest.raises(DaemonError, match="josé"):
        Systemd(System()).install(named)
    assert not Systemd(System()).file(named).exists()


def test_the_log_of_an_agent_begins_anew_at_each_start(peer: PeerFolder) -> None:
    manager = Launchd(System())
    manager.install(peer)
    words = plistlib.loads(manager.file(peer).read_bytes())["ProgramArguments"][:4]
    for text in ("one long sentence", "two"):
        subprocess.run([*words, "echo", text], check=True)
        assert (peer.path / "service.log").read_text() == f"{text}\n"
