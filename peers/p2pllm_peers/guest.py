"""Guest: when this peer may compute on a machine that belongs to somebody, and why not.

The rules are `why_not`, a pure function of the settings, the time and what the machine shows; `Guest` asks it every few
seconds and pauses the peer. What does not live here: what a pause does to a round (`rounds.loop`), and how much of the
processor a peer takes that may compute (`throttle`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import psutil

from p2pllm.errors import StateError
from p2pllm.settings import PeerSettings
from p2pllm_peers.folders import write_whole
from p2pllm_peers.presence import AWAY_S, Desktop, terminals_idle_s

log = logging.getLogger("p2pllm.guest")

PAUSE_FILE = "pause.json"
"""In a peer's folder: a pause that the user wants. {"until": Unix time, or null}."""

LOOK_S = 5.0
"""How often the machine is looked at."""

COOLER_C = 5.0
"""A machine that was too hot goes on when it is this much cooler, or it would start and stop all the time."""


@dataclass(frozen=True)
class Machine:
    """What a machine shows of itself. None: it does not tell."""

    on_mains: bool | None = None
    idle_s: float | None = None  # since somebody used its terminals, or its desktop
    celsius: float | None = None  # its hottest sensor

    @classmethod
    def now(cls) -> Machine:
        """Look at this machine; takes a few milliseconds."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return cls(battery.power_plugged if battery else None, terminals_idle_s(), _hottest())


def why_not(settings: PeerSettings, now: datetime, machine: Machine, *, was_hot: bool, moved: float) -> str:
    """Why the peer shall not compute, as a phrase for its user; empty if it may. now: local time.

    was_hot: it pauses for heat already. moved: bytes on the line this month. What the machine does not tell is no
    reason to pause.
    """
    if _is_spent(settings, moved):
        return f"the {settings.monthly_gb:g} GB of this month have been moved"
    if settings.hours and not settings.is_in_hours(now.time()):
        return f"outside of its hours, {settings.hours}"
    if settings.only_on_mains and machine.on_mains is False:
        return "the machine runs on battery"
    if settings.only_when_idle and machine.idle_s is not None and machine.idle_s < AWAY_S:
        return "somebody uses the machine"
    limit = settings.max_celsius - (COOLER_C if was_hot else 0.0)
    if settings.max_celsius and machine.celsius is not None and machine.celsius > limit:
        return f"the machine is too hot, over {settings.max_celsius:g} °C"
    return ""


def _is_spent(settings: PeerSettings, moved: float) -> bool:
    return bool(settings.monthly_gb) and moved >= settings.monthly_gb * 1e9


class Guest:
    """Pauses and resumes a peer. `run` it; the rest may be called at any time."""

    def __init__(
        self,
        settings: PeerSettings,
        file: Path,
        pause: Callable[[str], Awaitable[None]],
        resume: Callable[[], Awaitable[None]],
        moved: Callable[[datetime], float],
        look: Callable[[], Machine] = Machine.now,
        desktop: Desktop | None = None,
    ) -> None:
        """file: keeps a pause that the user wants over a restart. pause: called with the reason.

        moved: bytes on the line in the month of a time.
        """
        self.settings = settings
        self._file = file
        self._pause, self._resume = pause, resume
        self._moved, self._look = moved, look
        self._desktop = desktop or Desktop(lambda: self.settings.only_when_idle)
        self._until = _recall(file)
        self._reason = ""
        self._changed = asyncio.Event()
        self.is_spent = False
        """The traffic of the month has been moved, so nothing is to be served, either."""

    def pause(self, seconds: float | None) -> None:
        """Pause for so long, or until `resume`; on a disk that does not keep it, until the next start at most."""
        self._until = math.inf if seconds is None else time.time() + seconds
        self._changed.set()
        try:
            note_pause(self._file, seconds)
        except StateError as error:
            log.warning("the next start will not know of this pause: %s", error)

    def recall(self) -> None:
        """Go by the pause in the file, which a command wrote while nobody listened."""
        self._until = _recall(self._file)
        self._changed.set()

    def resume(self) -> str:
        """End the user's pause; returns why the peer does not compute yet, or nothing."""
        self._until = 0.0
        self._file.unlink(missing_ok=True)
        self._changed.set()
        return self._why_not()

    def change(self, settings: PeerSettings) -> None:
        """Go by these settings from now on."""
        self.settings = settings
        self._changed.set()

    async def run(self) -> None:
        """Look at the machine and at what the user wants, for good: whatever fails, limits are kept."""
        while True:
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._desktop.run())
                    both.create_task(self._mind())
            except Exception:
                log.exception("this machine cannot be looked after; trying again")
                await asyncio.sleep(LOOK_S)

    async def _mind(self) -> None:
        while True:
            self.is_spent = _is_spent(self.settings, self._moved(datetime.now()))
            reason = self._why_not()
            if reason != self._reason:
                log.info("%s", f"pausing: {reason}" if reason else "going on")
                await (self._pause(reason) if reason else self._resume())
                self._reason = reason
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LOOK_S, max(0.0, self._until - time.time()) or LOOK_S)):
                    await self._changed.wait()

    def _why_not(self) -> str:
        if self._until > time.time():
            if self._until == math.inf:
                return "until `p2pllm resume`"
            return f"until {_moment(datetime.fromtimestamp(self._until), datetime.now())}"
        now, was_hot = datetime.now(), self._reason.startswith("the machine is too hot")
        return why_not(self.settings, now, self._machine(), was_hot=was_hot, moved=self._moved(now))

    def _machine(self) -> Machine:
        """What it shows, if any setting asks for that."""
        asked = self.settings.only_on_mains or self.settings.only_when_idle or self.settings.max_celsius
        try:
            seen = self._look() if asked else Machine()
            told = [idle for idle in (seen.idle_s, self._desktop.idle_s) if idle is not None]
            return replace(seen, idle_s=min(told, default=None))
        except (OSError, psutil.Error, ValueError) as error:  # a driver that fails is no reason to pause
            log.debug("the machine cannot be looked at: %s", error)
            return Machine()


def _moment(when: datetime, now: datetime) -> str:
    """For people: with its date if that is not today's."""
    return f"{when:%H:%M}" if when.date() == now.date() else f"{when:%Y-%m-%d %H:%M}"


def note_pause(file: Path, seconds: float | None) -> None:
    """Have a daemon that does not listen yet pause for so long, None: until `resume`. Raises StateError."""
    write_whole(file, json.dumps({"until": None if seconds is None else time.time() + seconds}).encode())


def _recall(file: Path) -> float:
    """Until when a former daemon was to pause, Unix time; 0: it was not."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        until = json.loads(file.read_bytes())["until"]
        return math.inf if until is None else float(until)
    return 0.0


def _hottest() -> float | None:
    if not hasattr(psutil, "sensors_temperatures"):
        return None
    with contextlib.suppress(OSError):
        readings = [sensor.current for sensors in psutil.sensors_temperatures().values() for sensor in sensors]
        return max((reading for reading in readings if 0 < reading < 150), default=None)  # some sensors tell nonsense
    return None
