"""Faults by script: what befalls a peer when it enters a phase of a round.

    swarm.fail_at(peer=2, round=3, phase="exchange", how="kill")
    swarm.fail_at(peer=0, round=1, phase="vote", how="freeze", delay=0.0015, for_s=30.0)

Phases are those of a peer's status: "collecting", "roster", "exchange", "vote", "commit", and "joining", "done". A
round is named by the rounds that the peer has behind it, so the first one is round 0. What does not live here: how a
host dies or a path is cut (`host`, `network`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from p2pllm.rounds.messages import Phase

if TYPE_CHECKING:
    from p2pllm.testing.swarm import MemoryPeer

How = Literal["kill", "freeze", "cut", "slow"]
"""kill -9 (undone: it restarts with its state), SIGSTOP, cut off from everybody, SLOW_S more a message."""

SLOW_S = 0.5
"""How much longer each message from and to a slow peer takes."""


def fail_at(peer: MemoryPeer, round_: int, phase: Phase, how: How, *, delay: float = 0.0, for_s: float = 0.0) -> None:
    """Let a fault strike `delay` seconds after the peer has entered `phase` of the round, once.

    for_s: undone after so many seconds; 0: never. It is for this life of the peer: who is killed and comes back has no
    faults to come. Raises ValueError for a phase or a fault that there is not, which would never strike.
    """
    if phase not in get_args(Phase):
        raise ValueError(f"There is no phase {phase!r}; choose one of {', '.join(get_args(Phase))}.")
    strike, undo = _fault(peer, how)

    def act() -> None:
        strike()
        if for_s:
            asyncio.get_running_loop().call_later(for_s, undo, context=peer.swarm.network.context)

    peer.at(phase, round_, act, delay)


def _fault(peer: MemoryPeer, how: How) -> tuple[Callable[[], None], Callable[[], None]]:
    """What strikes, and what undoes it."""
    network = peer.swarm.network
    match how:
        case "kill":
            return peer.kill, lambda: _revive(peer)
        case "freeze":
            return peer.freeze, peer.thaw
        case "cut":
            return lambda: network.cut(peer.id), lambda: network.mend(peer.id)
        case "slow":
            return lambda: network.slow(peer.id, SLOW_S), lambda: network.slow(peer.id, 0.0)
    raise ValueError(f"There is no fault {how!r}; choose kill, freeze, cut or slow.")


def _revive(peer: MemoryPeer) -> None:
    """Start a killed peer again."""
    again = peer.swarm.restart(peer)
    again.host.spawn(again.start(), "restart")
