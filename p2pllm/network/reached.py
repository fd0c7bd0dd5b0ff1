"""Reached: which peers direct sockets reach, and which are not tried for a while because they were not.

What does not live here: dialling (`direct`).
"""

from __future__ import annotations

import asyncio
from typing import Any

RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
"""A peer that was not reached is tried again after so long, and twice as long after every further failure."""

FRESH_S = 10.0
"""A peer that was reached so lately is still there: a dial that fails now was only slow."""

ANEW_S = 60.0
"""A peer that says that it was started anew is tried again at once, but no more often than this."""

MAX_PEERS = 256
"""Peers that are remembered for one thing; the oldest are forgotten."""


class Reached:
    """Times are those of the loop."""

    def __init__(self) -> None:
        self._failed: dict[str, tuple[float, float]] = {}  # until when, and for how long, a peer is not tried
        self._reached: dict[str, float] = {}
        self._anew: dict[str, float] = {}

    def may_try(self, peer: str) -> bool:
        """Whether it is worth a dial."""
        return self._failed.get(peer, (0.0, 0.0))[0] <= _now()

    def pause(self, peer: str) -> float:
        """Seconds that the last failure keeps it from being tried; 0 after none."""
        return self._failed.get(peer, (0.0, 0.0))[1]

    def worked(self, peer: str) -> None:
        """It was reached."""
        self._failed.pop(peer, None)
        _put(self._reached, peer, _now())

    def failed(self, peer: str) -> None:
        """It was not; of several dials at once one success counts more than all failures."""
        now, (until, pause) = _now(), self._failed.get(peer, (0.0, RETRY_S / 2))
        if until > now or now - self._reached.get(peer, -FRESH_S) < FRESH_S:
            return
        pause = min(2 * pause, LONGEST_RETRY_S)
        _put(self._failed, peer, (now + pause, pause))

    def started_anew(self, peer: str) -> None:
        """It says so, and may be reached now."""
        if peer in self._failed and _now() - self._anew.get(peer, -ANEW_S) >= ANEW_S:
            del self._failed[peer]
            _put(self._anew, peer, _now())


def _put(what: dict[str, Any], peer: str, value: object) -> None:
    what.pop(peer, None)
    what[peer] = value
    bound(what)


def bound(what: dict[str, Any]) -> None:
    """Forget what was put in first, beyond MAX_PEERS."""
    while len(what) > MAX_PEERS:
        del what[next(iter(what))]


def _now() -> float:
    return asyncio.get_running_loop().time()
