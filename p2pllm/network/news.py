"""News: what each member has been told of our addresses and of other members, and so what its next beat must carry.

What does not live here: who is alive (`table`), the form of a beat (`beat`), and when one is sent (`membership`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from p2pllm.network.beat import Beat, plain
from p2pllm.network.table import MemberTable

AGAIN_S = 30.0
"""After this a member is told once more what fits, in swarms that the table does not slow down."""

LATER_HINTS = 8
"""Members that one beat tells of after the first beat: everybody else tells of them, too."""


class _Told(NamedTuple):
    version: int  # of the table
    addresses: tuple[str, ...]  # ours
    since: float


_NOTHING = _Told(-1, (), float("-inf"))


class News:
    """Makes the beats for all members."""

    def __init__(self, table: MemberTable, status: Callable[[], bytes], addresses: Callable[[], Sequence[str]]) -> None:
        self._table = table
        self._status = status
        self._addresses = addresses
        self._told: dict[str, _Told] = {}

    def beat(self, peer: str, now: float) -> bytes:
        """Our status and what this member does not know yet, packed."""
        before = self._told.get(peer)
        told = before or _NOTHING
        if now - told.since >= AGAIN_S * self._table.slowness:
            told = _NOTHING._replace(since=now)
        own = tuple(self._addresses())
        if (told.version, told.addresses) == (self._table.version, own):
            return plain(self._status())
        self._told[peer] = _Told(self._table.version, own, told.since)
        hints = self._table.hints(now, told.version)
        hints.pop(peer, None)
        if before and len(hints) > LATER_HINTS:
            hints = dict(random.sample(list(hints.items()), LATER_HINTS))
        return Beat(self._status(), own, hints).encode()

    def forget(self, peer: str) -> None:
        """The member may come back knowing nothing."""
        self._told.pop(peer, None)

    def tidy(self) -> None:
        """Drop those who are no members any more."""
        self._told = {peer: told for peer, told in self._told.items() if peer in self._table}
