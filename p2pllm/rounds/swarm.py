"""SwarmView: what this peer says of itself and what it has heard from the living others.

The bridge between membership, which moves opaque status bytes, and the round protocol, which reads them. It
decides nothing; `plan` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterable
from typing import NewType, Protocol

from p2pllm.rounds import plan
from p2pllm.rounds.chain import Branch, start_of
from p2pllm.rounds.messages import MessageError, Phase, Status

log = logging.getLogger(__name__)

OUTDATED_S = 2.0
"""How long a heartbeat may be on its way, or a peer take to say what we know from a round's messages."""

MAX_HEARD = 512
"""Statuses that are kept; beyond it those of the dead are dropped. Membership knows 256 members at most."""

LOOK_S_PER_PAIR = 3e-6
"""Least time between two looks at changes, for the square of the peers that are known: 0.2 s with 256. A look costs
more the more peers there are, and the more of them the more often something changes, and the less each change means."""

DOUBT_S = 60.0
"""How long nothing counts that a peer claims to hold, after it could not show what it claimed."""


class Liveness(Protocol):
    """The part of membership that the view needs."""

    def alive(self) -> frozenset[str]:
        """Peers heard of lately, without ourselves."""
        ...

    def push(self, but: Iterable[str] = ()) -> None:
        """Tell the others our status soon; those in `but` hear it with their next heartbeat."""
        ...

    def is_turned_away(self) -> bool:
        """Nobody is alive for us because the swarm is full."""
        ...


_Progress = NewType("_Progress", tuple[int, bool])


def _progress(status: Status) -> _Progress:
    """How far a peer is: its round, and whether it is about to commit the next."""
    return _Progress((status.round, status.phase in plan.FINISHING))


def _status_at(branch: Branch, *, phase: Phase = "starting", samples: int = 0, tokens_per_s: float = 0.0) -> Status:
    return Status(
        round=branch.head[0],
        digest=branch.head[1],
        total=branch.total,
        anchor=branch.anchor,
        phase=phase,
        samples=samples,
        tokens_per_s=tokens_per_s,
    )


@functools.lru_cache(maxsize=4096)  # most heartbeats say what the one before said
def _status(payload: bytes) -> Status:
    return Status.unpack(payload)


class SwarmView:
    """Own status and the others' last ones, with one event for every change."""

    def __init__(self, peer_id: str, run_id: str, *, last_round: int) -> None:
        """last_round: no claim beyond it is heard."""
        self.peer_id = peer_id
        self._start = start_of(run_id)
        self._last_round = last_round
        self.announced = self._start
        """The best branch that anybody announced in the DHT; only who shows it is believed."""
        self.own = _status_at(self._start)
        self.told = 0
        """Samples of ours that a heartbeat last told of."""
        self._packed: tuple[Status, bytes] | None = None
        self._heard: dict[str, Status] = {}
        self._doubted: dict[str, float] = {}
        self._reached: dict[str, tuple[_Progress, float]] = {}
        self._liveness: Liveness | None = None
        self._changed = asyncio.Event()
        self._last_look = float("-inf")
        self._living: tuple[frozenset[str], dict[str, Status]] | None = None  # None: to be gathered anew

    def attach(self, liveness: Liveness) -> None:
        """Use `liveness` to know who lives and to announce changes of ours."""
        self._liveness = liveness

    def statuses(self) -> dict[str, Status]:
        """Last status of every living peer, without ourselves; of a doubted one, that it is joining.

        Not to be changed by the caller.
        """
        alive = self._liveness.alive() if self._liveness else frozenset()
        if self._living is None or (self._living[0] is not alive and self._living[0] != alive):
            self._living = (alive, {peer: status for peer, status in self._heard.items() if peer in alive})
        heard = self._living[1]
        if not self._doubted:
            return heard
        now = asyncio.get_running_loop().time()
        self._doubted = {peer: until for peer, until in self._doubted.items() if until > now}
        joining = {peer: heard[peer].model_copy(update={"phase": "joining"}) for peer in self._doubted if peer in heard}
        return {**heard, **joining}

    def doubt(self, peers: Iterable[str]) -> None:
        """These could not show the state that they claim: for DOUBT_S seconds it moves nobody here."""
        until = asyncio.get_running_loop().time() + DOUBT_S
        self._doubted.update(dict.fromkeys(peers, until))
        self.notify()

    def is_turned_away(self) -> bool:
        """The swarm has no room for us: to train alone beside it would only make a fork."""
        return self._liveness is not None and self._liveness.is_turned_away()

    def with_own(self) -> dict[str, Status]:
        """Last status of every living peer and ours."""
        return {**self.statuses(), self.peer_id: self.own}

    def say(
        self,
        *,
        branch: Branch | None = None,
        phase: Phase | None = None,
        samples: int | None = None,
        tokens_per_s: float | None = None,
        at_once: bool = True,
    ) -> None:
        """Change what is given of our own status. at_once: announce it, not only with the next heartbeats."""
        old = self.own
        self.own = _status_at(
            old.branch if branch is None else branch,
            phase=old.phase if phase is None else phase,
            samples=old.samples if samples is None else samples,
            tokens_per_s=old.tokens_per_s if tokens_per_s is None else tokens_per_s,
        )
        if at_once:
            self.announce()
        self.notify()

    def announce(self) -> None:
        """Tell our status to the others now."""
        if self._liveness is not None:  # a paused peer is to be left in peace
            self._liveness.push([peer for peer, status in self.statuses().items() if status.phase == "paused"])

    def own_bytes(self) -> bytes:
        """Our status for a heartbeat."""
        self.told = self.own.samples
        if self._packed is None or self._packed[0] is not self.own:
            self._packed = (self.own, self.own.pack())
        return self._packed[1]

    def hear(self, peer: str, payload: bytes) -> None:
        """Take a status out of a heartbeat; one that is not valid is ignored."""
        try:
            status = _status(payload)
        except MessageError as error:
            log.debug("status of %s ignored: %s", peer, error)
            return
        if status.round > self._last_round or (status.round == 0 and status.branch != self._start):
            status = status.model_copy(update={"phase": "joining"})  # nothing that it claims to hold counts
        reached, until = self._reached.get(peer, (_Progress((0, False)), 0.0))
        if _progress(status) < reached and asyncio.get_running_loop().time() < until:
            return  # it was sent before what we know already
        old = self._heard.get(peer)
        if old is not status and old != status:
            self._keep(peer, status)
            self._bound(peer)
            self.notify()

    def hear_announced(self, payload: bytes) -> None:
        """Take a status out of a record of the DHT: its peer may be gone, but there was such a branch."""
        with contextlib.suppress(MessageError):
            status = _status(payload)
            if status.round <= self._last_round and status.branch.rank > self.announced.rank:
                self.announced = status.branch
                self.notify()

    def _keep(self, peer: str, status: Status) -> None:
        self._heard[peer] = status
        self._living = None

    def _bound(self, peer: str) -> None:
        """Drop the dead, and if that does not help the longest known, but never `peer`."""
        if len(self._heard) <= MAX_HEARD:
            return
        alive = self._liveness.alive() if self._liveness else frozenset()
        kept = [other for other in self._heard if other in alive and other != peer][1 - MAX_HEARD :]
        self._heard = {other: self._heard[other] for other in (*kept, peer)}
        self._living = None
        self._reached = {other: known for other, known in self._reached.items() if other in self._heard}

    def hear_ready(self, peer: str, branch: Branch) -> None:
        """Learn from a round's messages that a peer's update after `branch` is ready, ahead of its heartbeat."""
        old = self._heard.get(peer)
        if old is not None and (old.branch != branch or old.phase == "collecting"):
            self._keep(peer, _status_at(branch, phase="roster", samples=old.samples, tokens_per_s=old.tokens_per_s))
            self._outdate(peer)
        self.notify()

    def presume_commit(self, peers: Iterable[str], round_: int) -> None:
        """The round after `round_` is committed: its other members are about to step, too, whatever they said last.

        Heartbeats are slower than short rounds. Who went by the last ones would take a member of the round before
        for somebody who is not there, and go on alone beside it.
        """
        there = Branch((round_, bytes(32)), 0, 0)  # of a peer in that phase only the round counts: it leaves it at once
        for peer in peers:
            old = self._heard.get(peer)
            if old is not None and old.round <= round_:
                self._keep(peer, _status_at(there, phase="commit", tokens_per_s=old.tokens_per_s))
                self._outdate(peer)

    def _outdate(self, peer: str) -> None:
        """For OUTDATED_S seconds, heartbeats of less progress than we know of are late ones."""
        until = asyncio.get_running_loop().time() + OUTDATED_S
        self._reached[peer] = (_progress(self._heard[peer]), until)

    def forget(self, peer: str) -> None:
        """Drop the last status of a peer that is gone."""
        self._heard.pop(peer, None)
        self._living = None
        self._reached.pop(peer, None)
        self.notify()

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()

    async def wait_change(self, timeout: float) -> None:
        """Return after the next change, or after `timeout` seconds."""
        clock = asyncio.get_running_loop().time
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
                if (pause := self._last_look + LOOK_S_PER_PAIR * len(self._heard) ** 2 - clock()) > 0:
                    await asyncio.sleep(pause)
        except TimeoutError:
            pass
        self._last_look = clock()

    async def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition` holds; False if it does not within `timeout` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not condition():
            left = end - loop.time()
            if left <= 0:
                return False
            await self.wait_change(left)
        return True
