"""Presence: what systems print, and programs that are not there, fail or hang."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from p2pllm_peers import presence
from p2pllm_peers.presence import (
    AWAY_S,
    Desktop,
    ioreg_idle_s,
    logind_idle_s,
    printed_by,
    sessions_of,
    terminals_idle_s,
)

LISTING = """\
      2 1000 ann  seat0 tty2
     c1  120 gdm  seat0 tty1
     14 1000 ann        pts/1
"""
LISTING_V256 = """\
 1 1000 ann  seat0 2104 user         tty2 no   -
 2 1000 ann  -     2117 manager      -    no   -
15 1001 bob  -     9922 user         pts/3 yes 3min 2s ago
"""

GNOME = """\
Remote=no
Desktop=ubuntu
Type=wayland
Class=user
State=active
IdleHint={idle}
IdleSinceHint={since}
LockedHint={locked}
"""
GREETER = GNOME.format(idle="no", since=0, locked="no").replace("Class=user", "Class=greeter")
SSH = """\
Remote=yes
Desktop=
Type=tty
Class=user
State=active
IdleHint=no
IdleSinceHint=1700000000000000
LockedHint=no
"""
NOW = 1_700_000_600.0
SINCE = 1_700_000_000_000_000

IOREG = """\
+-o Root  <class IORegistryEntry, id 0x100000100, retain 32>
  +-o J314sAP  <class IOPlatformExpertDevice, id 0x10000026a, registered, matched, active, busy 0 (61518 ms), retain 47>
    +-o IOResources  <class IOResources, id 0x10000013f, registered, matched, active, busy 0 (4 ms), retain 48>
      +-o IOHIDSystem  <class IOHIDSystem, id 0x1000005c4, registered, matched, active, busy 0 (2 ms), retain 27>
        | {
        |   "IOClass" = "IOHIDSystem"
        |   "HIDIdleTime" = 412838958
        |   "HIDParameters" = {"HIDIdleTimeNot"=5,"HIDClickTime"=500000000}
        | }
"""


def gnome(idle: str, since: int = SINCE, locked: str = "no", **changes: str) -> str:
    shown = GNOME.format(idle=idle, since=since, locked=locked)
    for name, value in changes.items():
        shown = "".join(
            f"{name}={value}\n" if line.startswith(f"{name}=") else f"{line}\n" for line in shown.split("\n")
        )
        shown = shown.rstrip("\n") + "\n"
    return shown


def test_sessions() -> None:
    assert sessions_of(LISTING) == ["2", "c1", "14"]
    assert sessions_of(LISTING_V256) == ["1", "2", "15"]
    assert sessions_of("") == [] and sessions_of("--help 1 2\n\n;x\n") == []


@pytest.mark.parametrize(
    ("shown", "idle"),
    [
        (gnome("no"), 0.0),
        (gnome("no", 0), 0.0),  # GNOME tells, and its user has been there since the login
        (gnome("no", 0, Desktop="sway"), None),  # has never told, and perhaps never does
        (gnome("no", 0, Desktop=""), None),
        (gnome("no", SINCE, Desktop="sway"), 0.0),  # it has told
        (gnome("yes"), AWAY_S + 600),
        (gnome("no", locked="yes"), AWAY_S),
        (gnome("yes", 0), AWAY_S),
        (gnome("yes", SINCE * 2), AWAY_S),  # a clock that went back
        (gnome("no", Class="greeter"), None),
        (gnome("no", State="closing"), None),
        (gnome("no", Remote="yes"), None),
        (gnome("no", Type="tty"), None),
        (gnome("yes", IdleSinceHint="soon"), AWAY_S),
        (gnome("yes", IdleSinceHint="9" * 5000), AWAY_S),
        (GREETER, None),
        (SSH, None),
        (gnome("yes") + "\n" + SSH + "\n" + GREETER, AWAY_S + 600),
        (gnome("yes") + "\n" + gnome("no"), 0.0),  # the other of two users is there
        ("", None),
        ("System has not been booted with systemd as init system (PID 1). Can't operate.\n", None),
        ("=\n\n===\n\x00", None),
    ],
)
def test_desktops_of_linux(shown: str, idle: float | None) -> None:
    assert logind_idle_s(shown, NOW) == idle


def test_macos() -> None:
    assert ioreg_idle_s(IOREG) == pytest.approx(0.412838958)
    assert ioreg_idle_s(IOREG.replace("412838958", "3600000000000")) == 3600
    assert ioreg_idle_s("") is None and ioreg_idle_s('"HIDIdleTime" = <00ff>') is None


async def test_programs_that_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await printed_by([sys.executable, "-c", "print('here')"]) == "here\n"
    assert await printed_by([sys.executable, "-c", "print('here'); exit(1)"]) == ""
    assert await printed_by(["no-such-program-anywhere"]) == ""
    monkeypatch.setattr(presence, "ANSWER_S", 0.5)
    begun = time.monotonic()
    assert await printed_by([sys.executable, "-c", "import time; time.sleep(60)"]) == ""
    assert time.monotonic() - begun < 30, "it was not waited for"
    endless = "while True: print('x' * 4096)"
    assert len(await printed_by([sys.executable, "-c", endless])) <= presence._MAX_BYTES + (1 << 16)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
async def test_who_does_not_tell_is_no_reason(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    asked = list[list[str]]()

    async def silent(command: list[str]) -> str:
        asked.append(command)
        return ""

    desktop = Desktop(lambda: True, silent)
    await desktop.look()
    assert desktop.idle_s is None and len(asked) == 1


async def test_nobody_is_asked_unless_somebody_wants_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    wanted, asked = [False], list[list[str]]()

    async def ask(command: list[str]) -> str:
        asked.append(command)
        return IOREG

    desktop = Desktop(lambda: wanted[0], ask)
    running = asyncio.create_task(desktop.run())
    await asyncio.sleep(0)
    assert asked == [] and desktop.idle_s is None
    running.cancel()
    wanted[0] = True
    await desktop.look()
    assert asked and desktop.idle_s is not None and desktop.idle_s < AWAY_S
    wanted[0] = False
    await desktop.look()
    assert desktop.idle_s is None and len(asked) == 1


def test_terminals_of_this_machine() -> None:
    idle = terminals_idle_s()
    assert idle is None or idle >= 0
