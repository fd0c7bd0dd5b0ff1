"""Strikes that wait for a phase of a round: whom they mean, when that peer is there, and one after the other.

A daemon says on its control socket in which phase it is. One is asked at a time, only while a strike is awaited, every
POLL_S or more often. A strike is awaited once the swarm is whole, that is once all who are up take part for each other,
and has then committed CALM_ROUNDS rounds: so the struck of the last one are back, and each fault has a round without
faults before it. What does not live here: what is planned (`timeline`) and how a fault is done (`faults`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from p2pllm.errors import DaemonError
from p2pllm.rounds import plan
from p2pllm_peers.control import ask
from p2pllm_peers.lab.evidence import Strike, Struck
from p2pllm_peers.lab.scenario import LEADER, MEMBER, PeerSpec
from p2pllm_peers.lab.swarm import Swarm, SwarmPeer
from p2pllm_peers.lab.timeline import aimed_at

POLL_S = 0.02
BRIEF_S = 0.004
"""The same while a peer votes that is to be struck in its commit, which takes a few milliseconds."""

REST_S = 0.25
"""Between two looks while the phase does not matter yet."""

ANSWER_S = 1.0
"""A daemon that takes longer to answer tells nothing of a phase."""

CALM_ROUNDS = 2

CarryOut = Callable[[Strike, Struck], None]
"""Does a strike and notes when it did, and what went wrong."""


@dataclass(frozen=True)
class Sight:
    """What a peer said of itself when it was asked at `asked_at`, on the monotonic clock."""

    peer: str
    phase: str
    round: int
    asked_at: float


class Aiming:
    """Carries out what waits for a phase. `run` is for a thread of its own; `rows` says what became of each."""

    def __init__(
        self,
        events: list[Strike],
        swarm: Swarm,
        specs: Mapping[str, PeerSpec],
        carry_out: CarryOut,
        clock: Callable[[], float],
    ) -> None:
        """events: the whole plan. clock: seconds since the beginning."""
        self.rows: list[Struck] = []
        self._events = list(enumerate(events))
        self._swarm = swarm
        self._specs = specs
        self._carry_out = carry_out
        self._clock = clock
        self._stop = threading.Event()

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stop.set()

    def run(self) -> None:
        """One event after the other, each with what undoes it, until all are done or `stop`."""
        ends = {strike.undoes: (index, strike) for index, strike in self._events if strike.undoes is not None}
        for index, strike in self._events:
            if not strike.phase:
                continue
            row = Struck(event=index, at_s=self._clock())
            self.rows.append(row)
            sight = self._await(strike)
            row.at_s = self._clock()
            if sight is None:
                row.error = f"the end came before the {strike.peer} was seen in the phase {strike.phase}"
                continue
            row.peer, row.phase, row.round = sight.peer, sight.phase, sight.round
            self._carry_out(aimed_at(strike, self._specs[sight.peer]), row)
            row.age_s = round(time.monotonic() - sight.asked_at, 4)
            if index in ends and not row.error:
                self._undo(row, strike, *ends[index])

    def _undo(self, row: Struck, strike: Strike, index: int, end: Strike) -> None:
        wait_s = row.at_s + end.at_s - strike.at_s - self._clock()
        if not self._stop.wait(max(0.0, wait_s)):
            self.rows.append(Struck(event=index, at_s=self._clock(), peer=row.peer))
            self._carry_out(aimed_at(end, self._specs[row.peer]), self.rows[-1])

    def _await(self, strike: Strike) -> Sight | None:
        """The moment when whom the strike means is in the phase; None if the end comes first."""
        whole_since: int | None = None  # round at which the swarm was seen to be whole
        asked, pause = "", strike.at_s - self._clock()
        while not self._stop.wait(max(0.0, pause)):
            pause = REST_S
            there = {p.ready["peer_id"]: p for p in self._swarm.peers.values() if p.is_up and not p.frozen}
            asked_at = time.monotonic()
            status = _said(there.get(asked) or next(iter(there.values()), None))
            if status is None or not _is_whole(status, there):
                whole_since = None
                continue
            head = (int(status["round"]), bytes.fromhex(status["record"]))
            whole_since = head[0] if whole_since is None else whole_since
            if head[0] < whole_since + CALM_ROUNDS:
                continue
            meant = victim(strike.peer, plan.ranked(status["run_id"], head, there), self._swarm.peers)
            if status["peer_id"] == meant and status["phase"] == strike.phase:
                return Sight(there[meant].name, strike.phase, head[0], asked_at)
            asked = meant
            pause = BRIEF_S if (status["phase"], strike.phase) == ("vote", "commit") else POLL_S
        return None


def victim(who: str, ranked: list[str], peers: Mapping[str, SwarmPeer]) -> str:
    """The peer id of whom a strike means. ranked: ids of those who are there, as they would lead the round."""
    if who in (LEADER, MEMBER):
        return ranked[0 if who == LEADER else -1]
    return str(peers[who].ready.get("peer_id", ""))


def _said(peer: SwarmPeer | None) -> dict[str, Any] | None:
    if peer is None:
        return None
    try:
        return ask(peer.ready["socket"], {"do": "status"}, ANSWER_S)
    except (DaemonError, KeyError):  # it is about to end, or was started again just now
        return None


def _is_whole(status: dict[str, Any], there: Mapping[str, SwarmPeer]) -> bool:
    """Whether all who are there take part, as one of them sees it."""
    rows = [status, *status["peers"]]
    part = {row.get("peer", status["peer_id"]) for row in rows if row["phase"] in plan.TAKING_PART}
    near = all(abs(row["round"] - status["round"]) <= 1 for row in rows)
    return near and part >= there.keys()
