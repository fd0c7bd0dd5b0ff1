"""Settings on their way to a running peer: file, socket, worker, and what comes back to the user."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from p2pllm.errors import DaemonError
from p2pllm.settings import load_settings
from p2pllm_cli.guest import set_
from p2pllm_peers import sense, steering
from p2pllm_peers.commands import commands_of
from p2pllm_peers.flags import keep, kept
from p2pllm_peers.folders import RunFolder
from p2pllm_peers.guest import PAUSE_FILE
from p2pllm_peers.participant import NOT_BEFORE_THE_NEXT_START, RELAYS_UNTIL_THE_NEXT_START, Participant


class RunningPeer:
    """A folder whose daemon listens."""

    name, run = "volunteer", SimpleNamespace(run_id="ab" * 32)

    def running(self) -> dict[str, str]:
        return {"socket": "here"}


class Workers:
    """Of a machine that may or may not let them have a higher priority."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.told: list[tuple[int, bool]] = []

    def stand_back(self, nice: int, io_idle: bool) -> bool:
        self.told.append((nice, io_idle))
        return self.allowed


@pytest.fixture(params=[True, False], ids=["root", "user"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workers:
    """A running peer, without its network and its processes."""
    monkeypatch.setenv("P2PLLM_CONFIG", str(tmp_path))
    found = Workers(request.param)
    participant: Any = Participant.__new__(Participant)
    participant._settings, participant._compute = load_settings(), found
    participant._node = SimpleNamespace(relays_for_others=True)
    participant._limit, participant.guest = lambda settings: None, SimpleNamespace(change=lambda settings: None)
    commands = commands_of(participant, lambda: None)

    def ask(socket: str, request: dict[str, Any]) -> dict[str, Any]:
        return asyncio.run(commands[request["do"]](request))

    monkeypatch.setattr(steering, "ask", ask)
    monkeypatch.setattr(steering, "all_runs", lambda home: [SimpleNamespace(peers=lambda: [RunningPeer()])])
    return found


def test_priority_changes_while_a_peer_runs_or_the_user_hears_when(workers: Workers):
    shown = CliRunner().invoke(set_, ["nice=3", "io_idle=no"]).output
    assert workers.told == [(3, False)]
    assert "nice = 3\nio_idle = False\n" in shown and "goes by it now" in shown
    assert (NOT_BEFORE_THE_NEXT_START in shown) == (not workers.allowed)
    assert load_settings().nice == 3, "nothing is lost"


def test_other_settings_leave_the_priority_alone(workers: Workers):
    shown = CliRunner().invoke(set_, ["cpu_percent=50"]).output
    assert "goes by it now" in shown and NOT_BEFORE_THE_NEXT_START not in shown
    assert workers.told == []
    shown = CliRunner().invoke(set_, ["threads=2"]).output
    assert "from the next start" in shown and "now" not in shown


def test_a_limit_of_the_line_does_not_hold_for_what_is_relayed_until_the_next_start(workers: Workers):
    assert RELAYS_UNTIL_THE_NEXT_START in CliRunner().invoke(set_, ["monthly_gb=50"]).output
    assert RELAYS_UNTIL_THE_NEXT_START in CliRunner().invoke(set_, ["upload_mbit=5"]).output
    assert RELAYS_UNTIL_THE_NEXT_START not in CliRunner().invoke(set_, ["upload_mbit=0", "download_mbit=3"]).output


class Frozen(RunningPeer):
    name = "frozen"

    def running(self) -> dict[str, str]:
        return {"socket": "frozen"}


class Starting(RunningPeer):
    name = "starting"

    def __init__(self, path: Path) -> None:
        self.path = path

    def running(self) -> dict[str, str]:
        return {}


def test_one_that_does_not_answer_keeps_nothing_from_the_rest(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    answering = steering.ask

    def ask(socket: str, request: dict[str, Any]) -> dict[str, Any]:
        if socket == "frozen":
            raise DaemonError("The daemon does not answer (timed out); look at `p2pllm status`.")
        return answering(socket, request)

    peers = [Frozen(), Starting(tmp_path), RunningPeer()]
    monkeypatch.setattr(steering, "ask", ask)
    monkeypatch.setattr(steering, "all_runs", lambda home: [SimpleNamespace(peers=lambda: peers)])
    result = CliRunner().invoke(set_, ["cpu_percent=50"])
    assert result.exit_code == 0 and "'volunteer' in run abababababababab goes by it now" in result.output
    assert "'frozen' in run abababababababab does not go by it yet: The daemon does not answer" in result.output
    assert "'starting' in run abababababababab is still starting, and goes by it when it has." in result.output


def test_a_peer_that_is_starting_pauses(tmp_path: Path):
    peer: Any = Starting(tmp_path)
    steering.pause(peer, 60)
    assert "until" in json.loads((tmp_path / PAUSE_FILE).read_text())
    assert steering.resume(peer) == "" and not (tmp_path / PAUSE_FILE).exists()


def test_what_a_change_must_suit_runs_in_the_home_that_is_meant(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    looked: list[Path] = []
    monkeypatch.setattr(sense, "all_runs", lambda home: looked.append(home) or [])
    steering.change({"disk_gb": "5"}, tmp_path / "other")
    steering.change({"disk_gb": "5"})
    assert looked == [tmp_path / "other", load_settings().home]


def test_a_change_takes_the_place_of_a_flag(workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    peer = RunFolder(tmp_path, "ab" * 32).peer("volunteer")
    peer.path.mkdir(parents=True)
    keep(peer, {"upload_mbit": 9.0, "device": "cuda:1"})
    monkeypatch.setattr(steering, "all_runs", lambda home: [SimpleNamespace(peers=lambda: [peer])])
    shown = CliRunner().invoke(set_, ["upload_mbit=5"]).output
    assert "was started with upload_mbit = 9.0, which holds no more" in shown
    assert kept(peer) == {"device": "cuda:1"}
