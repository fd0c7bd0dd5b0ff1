"""Settings on their way to a running peer: file, socket, worker, and what comes back to the user."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from p2pllm.settings import load_settings
from p2pllm_cli.guest import set_
from p2pllm_peers import steering
from p2pllm_peers.commands import commands_of
from p2pllm_peers.participant import NOT_BEFORE_THE_NEXT_START, Participant


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
