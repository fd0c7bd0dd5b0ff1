"""The guest's rules, and that a pause is kept over a restart."""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path
from typing import Any

import pytest

from p2pllm.errors import SettingsError
from p2pllm.settings import load_settings
from p2pllm_peers.guest import COOLER_C, PAUSE_FILE, Guest, Machine, _moment, note_pause, why_not
from p2pllm_peers.participant import Participant
from p2pllm_peers.presence import AWAY_S, Desktop

NIGHT, NOON = datetime.datetime(2026, 1, 1, 3), datetime.datetime(2026, 1, 1, 12)


@pytest.mark.parametrize(
    ("settings", "when", "machine", "says"),
    [
        ({}, NOON, Machine(False, 0.0, 99.0), ""),
        ({"hours": "22-7"}, NIGHT, Machine(), ""),
        ({"hours": "22-7"}, NOON, Machine(), "22-7"),
        ({"hours": "11:30-12:30"}, NOON, Machine(), ""),
        ({"hours": "12:01-12:30"}, NOON, Machine(), "hours"),
        ({"only_on_mains": True}, NOON, Machine(on_mains=False), "battery"),
        ({"only_on_mains": True}, NOON, Machine(on_mains=True), ""),
        ({"only_on_mains": True}, NOON, Machine(on_mains=None), ""),
        ({"only_when_idle": True}, NOON, Machine(idle_s=AWAY_S - 1), "somebody"),
        ({"only_when_idle": True}, NOON, Machine(idle_s=AWAY_S + 1), ""),
        ({"max_celsius": 80}, NOON, Machine(celsius=81.0), "hot"),
        ({"max_celsius": 80}, NOON, Machine(celsius=79.0), ""),
        ({"monthly_gb": 2.4}, NOON, Machine(), "2.4 GB of this month"),
        ({"monthly_gb": 2.6}, NOON, Machine(), ""),
    ],
)
def test_rules(settings, when, machine, says):
    found = why_not(load_settings(**settings), when, machine, was_hot=False, moved=2.5e9)
    assert says in found and bool(says) == bool(found)


def test_a_hot_machine_cools_down_before_it_goes_on():
    settings = load_settings(max_celsius=80)
    assert why_not(settings, NOON, Machine(celsius=80 - COOLER_C + 1), was_hot=True, moved=0)
    assert not why_not(settings, NOON, Machine(celsius=80 - COOLER_C - 1), was_hot=True, moved=0)


@pytest.mark.parametrize("hours", ["22", "22-25", "a-b", "22-7-9", "7-7", "22:61-3", "-", "1:2:3:4-5"])
def test_hours_that_are_none(hours):
    with pytest.raises(SettingsError, match="hours"):
        load_settings(hours=hours)


def nothing(now: datetime.datetime) -> float:
    """Bytes moved this month."""
    return 0.0


class Peer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.reason = ""
        self.changed = asyncio.Event()

    async def pause(self, reason: str) -> None:
        self.reason = reason
        self.changed.set()

    async def resume(self) -> None:
        await self.pause("")

    async def told(self) -> str:
        await asyncio.wait_for(self.changed.wait(), 5)
        self.changed.clear()
        return self.reason


async def test_a_pause_of_the_user(tmp_path: Path):
    peer, file = Peer(), tmp_path / "pause.json"
    guest = Guest(load_settings(), file, peer.pause, peer.resume, nothing, Machine)
    task = asyncio.create_task(guest.run())
    guest.pause(None)
    assert "resume" in await peer.told()
    again = Peer()
    after_restart = Guest(load_settings(), file, again.pause, again.resume, nothing, Machine)
    other = asyncio.create_task(after_restart.run())
    assert "resume" in await again.told(), "a restart does not end it"
    assert guest.resume() == ""
    assert await peer.told() == "" and not file.exists()
    guest.pause(3600)
    assert (await peer.told()).startswith("until ")
    guest.pause(0.05)
    while await peer.told():
        pass  # it ends by itself
    for each in (task, other):
        each.cancel()


async def test_settings_can_change_and_resume_says_what_is_in_the_way(tmp_path: Path):
    peer = Peer()
    guest = Guest(load_settings(), tmp_path / "p", peer.pause, peer.resume, nothing, lambda: Machine(on_mains=False))
    task = asyncio.create_task(guest.run())
    guest.pause(None)
    await peer.told()
    guest.change(load_settings(only_on_mains=True))
    assert "battery" in guest.resume()
    assert "battery" in await peer.told()
    guest.change(load_settings())
    assert await peer.told() == ""
    task.cancel()


def test_a_long_pause_says_the_day():
    now = datetime.datetime(2026, 11, 30, 22, 5)
    assert _moment(datetime.datetime(2026, 11, 30, 23, 59), now) == "23:59"
    assert _moment(datetime.datetime(2026, 12, 1, 0, 5), now) == "2026-12-01 00:05"


async def test_a_pause_that_was_noted_while_nobody_listened(tmp_path: Path):
    file, peer = tmp_path / PAUSE_FILE, Peer()
    guest = Guest(load_settings(), file, peer.pause, peer.resume, nothing, Machine)
    note_pause(file, None)
    assert guest._why_not() == ""
    guest.recall()
    assert guest._why_not() == "until `p2pllm resume`"
    file.unlink()
    guest.recall()
    assert guest._why_not() == ""


@pytest.mark.parametrize("content", [b"", b"[]", b'{"until": "x"}', b"{}"])
async def test_a_damaged_file_is_no_pause(tmp_path: Path, content: bytes):
    file, peer = tmp_path / "pause.json", Peer()
    file.write_bytes(content)
    guest = Guest(load_settings(), file, peer.pause, peer.resume, nothing, Machine)
    assert guest.resume() == ""


async def test_a_look_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("p2pllm_peers.guest.LOOK_S", 0.001)
    answers = iter([OSError("a folder has just gone"), 3e9])

    def moved(now: datetime.datetime) -> float:
        answer = next(answers, 3e9)
        if isinstance(answer, OSError):
            raise answer
        return answer

    peer = Peer()
    guest = Guest(load_settings(monthly_gb=2), tmp_path / "p", peer.pause, peer.resume, moved)
    task = asyncio.create_task(guest.run())
    assert "this month" in await peer.told()
    task.cancel()


async def test_a_peer_whose_traffic_is_spent_serves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("p2pllm_peers.guest.LOOK_S", 0.001)
    peer, moved = Peer(), [1e9]
    guest = Guest(load_settings(monthly_gb=2), tmp_path / "p", peer.pause, peer.resume, lambda now: moved[0], Machine)
    daemon: Any = Participant.__new__(Participant)
    daemon.guest, daemon._sealed = guest, (None, None, b"tokenizer")
    guest.pause(None)
    task = asyncio.create_task(guest.run())
    assert "resume" in await peer.told()
    assert await daemon._serve({"what": "tokenizer"}) is not None
    moved[0] = 2e9
    guest.resume()
    assert "this month" in await peer.told()
    with pytest.raises(ConnectionRefusedError):
        await daemon._serve({"what": "tokenizer"})
    guest.change(load_settings(monthly_gb=3))
    assert await peer.told() == ""
    assert await daemon._serve({"what": "tokenizer"}) is not None
    task.cancel()


async def test_a_full_disk_does_not_keep_a_peer_from_pausing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    peer = Peer()
    guest = Guest(load_settings(), tmp_path / "not there" / "p", peer.pause, peer.resume, nothing)
    task = asyncio.create_task(guest.run())
    guest.pause(60)
    assert "until" in await peer.told()
    assert "next start" in caplog.text
    guest.resume()
    assert await peer.told() == ""
    task.cancel()


def test_this_machine_can_be_looked_at():
    seen = Machine.now()
    assert seen.idle_s is None or seen.idle_s >= 0
    assert seen.celsius is None or 0 < seen.celsius < 150


async def test_a_desktop_in_use_is_use_whatever_the_terminals_say(tmp_path: Path):
    shown = ["no"]

    async def ask(command: list[str]) -> str:
        if "list-sessions" in command:
            return "2 1000 ann seat0 tty2\n"
        return f"Class=user\nType=wayland\nState=active\nRemote=no\nIdleHint={shown[0]}\nIdleSinceHint=1\n"

    peer, settings = Peer(), load_settings(only_when_idle=True)
    desktop = Desktop(lambda: True, ask)
    away = Machine(idle_s=AWAY_S * 2)
    guest = Guest(settings, tmp_path / "p", peer.pause, peer.resume, nothing, lambda: away, desktop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.platform", "linux")
        await desktop.look()
        assert "somebody" in guest.resume()
        shown[0] = "yes"
        await desktop.look()
        assert guest.resume() == ""
