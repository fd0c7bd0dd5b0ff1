"""Presence: since when nobody has used this machine's keyboard and mouse, as far as its system tells.

Terminals tell it by their times, Linux desktops through systemd-logind, macOS through its input driver. What does not
live here: what follows from it (`guest`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

AWAY_S = 300.0
"""Nobody has typed for this long: the machine's user is away."""

ASK_EVERY_S = 15.0
"""A desktop is asked no more often: each time is a process, of some milliseconds."""

ANSWER_S = 3.0
"""How long such a process may take."""

_MAX_BYTES = 1 << 20
_MAX_SESSIONS = 32

_ASKED = ("Class", "Type", "State", "Remote", "Desktop", "IdleHint", "IdleSinceHint", "LockedHint")
_TELLS = ("gnome", "ubuntu", "cinnamon", "pop")
"""Desktops that are known to set the hint; of others, one that was never set says nothing."""

Run = Callable[[list[str]], Awaitable[str]]


def terminals_idle_s() -> float | None:
    """Since somebody typed on a terminal, or moved a mouse where the system counts that as one; as `w` tells it."""
    newest = 0.0
    for folder, pattern in (("/dev/pts", "[0-9]*"), ("/dev", "tty[0-9]*"), ("/dev", "ttys[0-9]*")):
        for terminal in Path(folder).glob(pattern):
            with contextlib.suppress(OSError):
                status = terminal.stat()
                if status.st_uid or folder == "/dev/pts":  # consoles that nobody has logged in at are root's
                    newest = max(newest, status.st_atime)
    return max(0.0, time.time() - newest) if newest else None


def sessions_of(listing: str) -> list[str]:
    """Ids of the sessions in what `loginctl list-sessions --no-legend` prints."""
    ids = (line.split()[0] for line in listing.splitlines() if line.strip())
    return [id_ for id_ in ids if re.fullmatch(r"[A-Za-z0-9]{1,32}", id_)][:_MAX_SESSIONS]


def logind_idle_s(shown: str, now: float) -> float | None:
    """Seconds since the user of any desktop here was active, from what `loginctl show-session` prints.

    now: Unix time. A desktop calls itself idle after a time of its own; that it does is at least AWAY_S. None if no
    desktop tells.
    """
    blocks = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in shown.split("\n\n")]
    found = [seconds for block in blocks if (seconds := _session_idle_s(block, now)) is not None]
    return min(found, default=None)


def _session_idle_s(session: dict[str, str], now: float) -> float | None:
    if session.get("Class") != "user" or session.get("Type") not in ("x11", "wayland", "mir"):
        return None  # a terminal, whose time we see ourselves, or a login screen
    if session.get("Remote") == "yes" or session.get("State") not in ("active", "online"):
        return None
    since = session.get("IdleSinceHint", "")
    changed = int(since) / 1e6 if re.fullmatch("[0-9]{1,20}", since) else 0.0
    if session.get("IdleHint") == "yes" or session.get("LockedHint") == "yes":
        return AWAY_S + (max(0.0, now - changed) if changed and session.get("IdleHint") == "yes" else 0.0)
    tells = changed > 0 or any(name in session.get("Desktop", "").lower() for name in _TELLS)
    return 0.0 if tells and session.get("IdleHint") == "no" else None


def ioreg_idle_s(shown: str) -> float | None:
    """Seconds since the last input, from what `ioreg -c IOHIDSystem` prints; None if it does not tell."""
    found = [int(nanoseconds) / 1e9 for nanoseconds in re.findall(r'"HIDIdleTime"\s*=\s*([0-9]{1,20})\b', shown)]
    return min(found, default=None)


async def desktop_idle_s(run: Run) -> float | None:
    """Ask this system's desktops; None if they do not tell."""
    if sys.platform == "darwin":
        return ioreg_idle_s(await run(["ioreg", "-c", "IOHIDSystem", "-d", "4"]))
    sessions = sessions_of(await run(["loginctl", "list-sessions", "--no-legend"]))
    if not sessions:
        return None
    shown = await run(["loginctl", "show-session", *sessions, *(f"--property={name}" for name in _ASKED)])
    return logind_idle_s(shown, time.time())


async def printed_by(command: list[str]) -> str:
    """What a program prints, in the language C; empty if it is not here, fails, or takes longer than ANSWER_S."""
    path = shutil.which(command[0])
    if path is None:
        return ""
    process = None
    try:
        async with asyncio.timeout(ANSWER_S):
            process = await asyncio.create_subprocess_exec(
                *(path, *command[1:]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={"LC_ALL": "C"},
            )
            assert process.stdout is not None  # noqa: S101 - it was asked for
            shown = b""
            while len(shown) < _MAX_BYTES and (piece := await process.stdout.read(1 << 16)):
                shown += piece
            return shown.decode(errors="replace") if await process.wait() == 0 else ""
    except (OSError, TimeoutError):
        return ""
    finally:
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                process.kill()
                async with asyncio.timeout(ANSWER_S):
                    await process.communicate()  # so that nothing of it is left


def tells_idleness() -> bool:
    """Whether anything of this machine tells when it was used. Not within a running event loop."""
    return terminals_idle_s() is not None or asyncio.run(desktop_idle_s(printed_by)) is not None


class Desktop:
    """Asks the desktops of this machine now and then, while somebody wants to know. `run` it."""

    def __init__(self, wanted: Callable[[], bool], ask: Run = printed_by) -> None:
        """ask: what a program prints, empty if it does not tell."""
        self._wanted, self._ask = wanted, ask
        self._active_at: float | None = None  # monotonic time

    @property
    def idle_s(self) -> float | None:
        """Seconds since its user was active, as it was told last; None if it does not tell."""
        return None if self._active_at is None else time.monotonic() - self._active_at

    async def run(self) -> None:
        """Ask for good."""
        while True:
            await self.look()
            await asyncio.sleep(ASK_EVERY_S)

    async def look(self) -> None:
        """Ask once, if that is wanted."""
        idle = await desktop_idle_s(self._ask) if self._wanted() else None
        self._active_at = None if idle is None else time.monotonic() - idle
