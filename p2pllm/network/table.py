"""MemberTable: who is known and who is alive, decided from what was heard and when. Pure: no clock, no
network.

Times are seconds on any clock that only goes forward. What does not live here: sending beats (`membership`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

from p2pllm.network.addresses import MAX_ADDRESSES

BEAT_EVERY_S = 1.0
"""Silence after which a living member is sent a beat, in swarms that BEATS_A_SECOND does not slow down."""

ALIVE_S = 5.0
"""A member that was not heard of for so long is not alive, in such swarms."""

BEATS_A_SECOND = 64
"""Beats that one member begins towards all the living together. Replies to those that others begin come on top, and so
do calls to members that are not known to live. With more living members than that, each has its beats less often, and
its silence is borne with for longer in the same measure."""

DIALS = 2
"""Members that are not known to live that one look (`due`) gives: who joins a large swarm does not call all of it at
once."""

RETRY_S = 0.2
"""A member whose connection failed is tried again this soon; the second failure makes it dead."""

MAX_BACKOFF_S = 30.0
"""Longest time between attempts to reach a dead member."""

FORGET_S = 600.0
"""A dead member is forgotten after this, one that was only heard of by hearsay after a fifth of it."""

PUSH_EVERY_S = 0.1
"""Least time between two beats to one member, in such swarms."""

MAX_MEMBERS = 256
"""Known members; direct callers displace hearsay and the dead, never the living."""

_YIELD_S = 0.25
"""One beat informs both ends, so of two only the one with the smaller id sends, unless it falls silent."""

_LEFT_S = 30.0
"""Hearsay about a member that has said goodbye is ignored for so long."""


@dataclass(slots=True)
class Member:
    """What is known of one peer. `heard` is None until it was heard of directly."""

    peer: str
    addresses: tuple[str, ...]
    known_since: float
    pinned: bool = False
    heard: float | None = None
    alive_until: float = -math.inf
    failures: int = 0
    next_beat: float = 0.0
    last_beat: float = -math.inf
    told: int = -1  # which of our statuses last went to it, in a beat or in the reply to one of its own
    news: int = 0  # the table's version since which we can tell others of it

    def is_alive(self, now: float) -> bool:
        """Heard of directly lately, and not failing since."""
        return now < self.alive_until and self.failures < 2

    def is_due(self, now: float, status: int, push_every: float) -> bool:
        """Whether it is time for a beat. status: the number of ours; push_every: least seconds from beat to beat."""
        if now >= self.next_beat:
            return now - self.last_beat >= PUSH_EVERY_S
        return self.told < status and now - self.last_beat >= push_every and self.is_alive(now)


class MemberTable:
    """All known members but ourselves. `version` rises when what we would tell others changes."""

    def __init__(self, own_id: str) -> None:
        self._own_id = own_id
        self._members: dict[str, Member] = {}
        self._left: dict[str, float] = {}
        self._status = 0  # the number of the status that we have now
        self._alive: frozenset[str] | None = frozenset()  # None: to be worked out anew
        self._living = 0  # how many they were at last
        self._until = math.inf  # when the first of them would be silent for too long
        self.version = 0

    def __getitem__(self, peer: str) -> Member:
        return self._members[peer]

    def __contains__(self, peer: str) -> bool:
        return peer in self._members

    def alive(self, now: float) -> frozenset[str]:
        """Peer ids of the living."""
        # Asked for with every message of every member, but it hardly ever changes.
        if self._alive is None or now >= self._until:
            living = [member for member in self._members.values() if member.is_alive(now)]
            self._alive = frozenset(member.peer for member in living)
            self._living = len(living)
            self._until = min((member.alive_until for member in living), default=math.inf)
        return self._alive

    def hints(self, now: float, since: int) -> dict[str, tuple[str, ...]]:
        """Addresses by peer id of the living of whom there is news since a `version`, in the order in which they became
        known.
        """
        if since >= self.version:
            return {}
        alive = self.alive(now)
        members = self._members.items()
        return {peer: member.addresses for peer, member in members if member.news > since and peer in alive}

    def known(self) -> dict[str, tuple[str, ...]]:
        """Addresses by peer id."""
        return {peer: member.addresses for peer, member in self._members.items()}

    def due(self, now: float) -> list[str]:
        """Whom to send a beat: the living first, then those who have waited longest."""
        status, every = self._status, self._push_every_s
        due = [
            member
            for member in self._members.values()
            if (now >= member.next_beat or member.told < status) and member.is_due(now, status, every)  # few are
        ]
        living = [member.peer for member in due if member.is_alive(now)]
        others = [member for member in due if not member.is_alive(now)]
        if len(others) > DIALS:
            others = heapq.nsmallest(DIALS, others, key=lambda member: member.next_beat)
        return living + [member.peer for member in others]

    def is_due(self, peer: str, now: float) -> bool:
        """Whether it is time to send this one a beat."""
        member = self._members.get(peer)
        return member is not None and member.is_due(now, self._status, self._push_every_s)

    @property
    def slowness(self) -> float:
        """How much longer than with few living members everything takes that is done for each of them; at least 1."""
        return max(1.0, self._living * BEAT_EVERY_S / BEATS_A_SECOND)

    @property
    def _push_every_s(self) -> float:
        return max(PUSH_EVERY_S, self._living / BEATS_A_SECOND)

    def learn(self, peer: str, addresses: Iterable[str], now: float, *, pinned: bool = False) -> bool:
        """Hearsay: somebody, a file or the DHT says that the peer may be there. Whether that was news.

        A living member's own word about its addresses is not overruled. Pinned members are never forgotten.
        """
        known = tuple(addresses)
        if peer == self._own_id or now - self._left.get(peer, float("-inf")) < _LEFT_S:
            return False
        member = self._members.get(peer)
        if member is None:
            if not self._make_room(now, direct=pinned):
                return False
            self._members[peer] = Member(peer, known, now, pinned, next_beat=now)
            return True
        member.pinned = member.pinned or pinned
        if member.is_alive(now):
            return False
        # Any of them may be the stale one, so they are kept together: the news first, but what an invite gave
        # is not to be pushed out by hearsay.
        order = (*member.addresses, *known) if member.pinned and not pinned else (*known, *member.addresses)
        merged = tuple(dict.fromkeys(order))[:MAX_ADDRESSES]
        if merged == member.addresses:
            return False
        member.addresses = merged
        return True

    def heard(self, peer: str, now: float, addresses: Iterable[str] = ()) -> bool:
        """The peer called or answered; whether it is in the table now (not if that is full of living
        members)."""
        if peer == self._own_id:
            return False
        known = tuple(addresses)
        member = self._members.get(peer)
        if member is None:
            if not self._make_room(now, direct=True):
                return False
            member = self._members[peer] = Member(peer, known, now)
        was_alive = member.is_alive(now)
        if not was_alive or (known and known != member.addresses):
            self.version += 1
            member.news = self.version
        if not was_alive and self._alive is not None:
            self._alive |= {peer}
            self._living += 1
        member.addresses = known or member.addresses
        member.heard = now
        member.alive_until = now + ALIVE_S * self.slowness
        self._until = min(self._until, member.alive_until)
        member.failures = 0
        member.next_beat = now + BEAT_EVERY_S * self.slowness + (_YIELD_S if self._own_id > peer else 0)
        self._left.pop(peer, None)
        return True

    def beat_sent(self, peer: str, now: float) -> None:
        """A beat is on its way."""
        member = self._members[peer]
        member.last_beat, member.told = now, self._status
        member.next_beat = now + BEAT_EVERY_S * self.slowness

    def answered(self, peer: str) -> None:
        """Our status is on its way in a reply."""
        if (member := self._members.get(peer)) is not None:
            member.told = self._status

    def failed(self, peer: str, now: float, *, refused: bool) -> None:
        """A beat failed. refused: nobody is there or the connection broke, which is certain; else only no
        answer.

        One refusal makes a member suspected, and it is tried again at once; a second one makes it dead.
        """
        member = self._members.get(peer)
        if member is None:
            return
        was_alive = member.is_alive(now)
        if refused or not was_alive:
            member.failures += 1
        if refused and member.failures == 1 and was_alive:
            member.next_beat = now + RETRY_S
        elif not member.is_alive(now):
            # a dead one counts from 2, so that an answer is needed to make it alive
            member.failures = max(member.failures, 2)
            member.next_beat = now + min(MAX_BACKOFF_S, 2.0 ** min(member.failures - 2, 10))
        if was_alive and not member.is_alive(now):
            self.version += 1
            self._alive = None

    def left(self, peer: str, now: float) -> None:
        """The peer said goodbye."""
        if self._members.pop(peer, None) is not None:
            self.version += 1
            self._alive = None
            self._left = {gone: at for gone, at in self._left.items() if now - at < _LEFT_S}
            if len(self._left) < MAX_MEMBERS:
                self._left[peer] = now

    def push(self, but: Iterable[str] = ()) -> None:
        """Our status changed: every living member is due, unless it was told something just now, or is in `but`."""
        self._status += 1
        for peer in but:
            if peer in self._members:
                self._members[peer].told = self._status

    def forgive(self, gap: float, now: float) -> None:
        """We ourselves did not run for `gap` seconds: nobody's silence in that time counts."""
        self._alive = None
        patience = ALIVE_S * self.slowness
        for member in self._members.values():
            if member.heard is not None:
                member.heard = min(now, member.heard + gap)
                member.alive_until = min(now + patience, member.alive_until + gap)

    def forget(self, now: float) -> None:
        """Drop who has been dead for long."""
        for member in list(self._members.values()):
            patience = FORGET_S if member.heard is not None else FORGET_S / 5
            since = member.heard if member.heard is not None else member.known_since
            if not member.pinned and now - since > patience:
                del self._members[member.peer]

    def _make_room(self, now: float, *, direct: bool) -> bool:
        """Whether one more fits, after dropping hearsay (or else the longest dead) for one that is there for
        sure.
        """
        if len(self._members) < MAX_MEMBERS:
            return True
        if not direct or len(self.alive(now)) == MAX_MEMBERS:
            return False
        candidates = [m for m in self._members.values() if not m.pinned and not m.is_alive(now)]
        if not candidates:
            return False
        worst = min(candidates, key=lambda m: (m.heard is not None, m.heard or m.known_since))
        del self._members[worst.peer]
        return True
