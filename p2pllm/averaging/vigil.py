"""Vigil: what we wait for, of whom, since when; and whom to blame when it does not come.

Blame follows one rule. Sending values and reading means are things that a member does whatever others do, so
who does not is at fault. Giving out means and taking values are not: a member that lacks a third one's
values stops both, so it is blamed only where nobody is at fault for sure, and later. What does not live
here: streams.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Iterator
from contextlib import contextmanager

from p2pllm.errors import NetworkError

_VICTIM_PATIENCE = 1.5
"""Times the stall timeout before a peer is blamed that may itself be waiting for the culprit: by then the
member that lacks the culprit's values has found out and told everybody. Connecting gets as long."""


class GaveUp(Exception):  # noqa: N818 - not an error: it becomes a result
    """The attempt failed. `blamed` are the members at fault, as far as seen from here."""

    def __init__(self, blamed: frozenset[str], reason: str) -> None:
        super().__init__(reason)
        self.blamed = blamed
        self.reason = reason


class Want(enum.Enum):
    """What we want of a peer; the value completes the sentence "we waited for ... PEER"."""

    INPUT = "the values of"
    GIVE = "our mean to be taken by"
    OPEN = "a stream to"
    PULL = "a mean from"
    PUSH = "our values to be taken by"


_CERTAIN = (Want.INPUT, Want.GIVE, Want.OPEN)
_PATIENT = (Want.OPEN, Want.PULL, Want.PUSH)


class Progress:
    """When a peer last did one kind of thing, on whichever stream: on a busy line one may stand while others go on."""

    def __init__(self) -> None:
        self.at = -math.inf  # by the loop's clock


class Wait:
    """Since when we have waited for one thing of one peer without any progress."""

    def __init__(self, peer: str, want: Want, progress: Progress | None = None) -> None:
        """progress: shared by the waits for the same thing of the same peer."""
        self.peer = peer
        self.want = want
        self.longest = 0.0
        """Longest silence after which there was progress, in seconds."""
        self._since: float | None = None
        self._progress = progress or Progress()
        self._loop = asyncio.get_running_loop()

    def touch(self) -> None:
        """There was progress."""
        if self._since is not None:
            self.longest = max(self.longest, self.silence())
            self._progress.at = self._loop.time()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """We wait while the block runs."""
        self._since = self._loop.time()
        try:
            yield
        finally:
            self.longest = max(self.longest, self.silence())
            self._since = None

    def silence(self) -> float:
        """Seconds without progress; negative while we do not wait."""
        return -1.0 if self._since is None else self._loop.time() - max(self._since, self._progress.at)


class Vigil:
    """All waits of one attempt."""

    def __init__(self, stall_timeout: float) -> None:
        self._stall = stall_timeout
        self._waits: list[Wait] = []
        self._progress: dict[tuple[str, Want], Progress] = {}

    def wait(self, peer: str, want: Want) -> Wait:
        """A new wait, watched from now on."""
        self._waits.append(Wait(peer, want, self._progress.setdefault((peer, want), Progress())))
        return self._waits[-1]

    @property
    def longest_silence(self) -> float:
        """Of all waits that ended well, in seconds, against the patience that each had."""
        return max((wait.longest / _patience(wait) for wait in self._waits), default=0.0)

    async def watch(self) -> None:
        """Raise GaveUp when a peer has made no progress for too long; else run until cancelled."""
        nap = self._stall / 8
        clock = asyncio.get_running_loop().time
        while True:
            before = clock()
            await asyncio.sleep(nap)
            if clock() - before > nap + self._stall / 4:
                # We were frozen ourselves (a stopped process, a suspended laptop): nobody else is to blame.
                for wait in self._waits:
                    wait.touch()
            elif any(self._lateness(wait) >= 1.0 for wait in self._waits):
                # Who is nearly as late belongs to the same fault and would only cost another attempt.
                raise self.give_up(f"For {self._stall:g} s", 0.8)

    def give_up(self, when: str, lateness: float = 0.0) -> GaveUp:
        """A GaveUp that blames whom we have waited for, at least `lateness` times our patience."""
        late = [wait for wait in self._waits if self._lateness(wait) >= lateness]
        late = [wait for wait in late if wait.want in _CERTAIN] or late
        things = sorted({f"{wait.want.value} {wait.peer}" for wait in late})
        reason = f"{when} we waited for {', '.join(things) or 'nobody'}."
        return GaveUp(frozenset(wait.peer for wait in late), reason)

    def _lateness(self, wait: Wait) -> float:
        return wait.silence() / (self._stall * _patience(wait))


def _patience(wait: Wait) -> float:
    """How many stall time-outs we bear with a wait."""
    return _VICTIM_PATIENCE if wait.want in _PATIENT else 1.0


@contextmanager
def blaming(peer: str) -> Iterator[None]:
    """Turn a broken stream into GaveUp that blames `peer`."""
    try:
        yield
    except (NetworkError, OSError) as error:
        raise GaveUp(frozenset({peer}), f"The stream with {peer} broke: {error}") from None
