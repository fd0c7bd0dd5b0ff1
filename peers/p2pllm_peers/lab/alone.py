"""What each peer does alone: the same machines, model and data, at the same time, but no network between them.

Every peer trains a run of its own on loopback with its own CPU budget. The sum of their speeds is what a swarm could
reach if talking cost nothing; efficiency is measured against it, on the same cores in the same run of the lab.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings
from p2pllm_peers.lab.machines import Machines
from p2pllm_peers.lab.swarm import LEAVE_TIMEOUT_S, Progress, SwarmPeer, start_together

SETTLE_S = 3.0
"""The first micro-batches of a worker are slower; they are not counted."""

Wait = Callable[[float], None]


def measure_alone(
    machines: Machines, draft: RunDraft, settings: PeerSettings, seconds: float, progress: Progress, wait: Wait
) -> dict[str, float]:
    """Tokens a second of each peer alone, measured over `seconds`. Raises P2PLLMError.

    wait: sleeps for so many seconds; the caller's, so that it can be interrupted.
    """
    alone = draft.model_copy(update={"round": draft.round.model_copy(update={"min_peers": 1, "rounds": 10**9})})
    settings = settings.model_copy(update={"nat": False, "threads": 1})
    peers = [SwarmPeer(machines.offline(name), settings, partial(machines.pids, name)) for name in machines.specs]
    try:
        start_together(peers, lambda peer: peer.start(progress, draft=alone))
        for peer in peers:
            machines.limit(peer.name, peer.machine.spec.cores)
        wait(SETTLE_S)
        progress(f"each peer trains alone for {seconds:g} s")
        before = [_computed(peer) for peer in peers]
        wait(seconds)
        after = [_computed(peer) for peer in peers]
    finally:
        for peer in peers:
            machines.limit(peer.name, 0)
            peer.leave()
        for peer in peers:
            peer.wait_gone(LEAVE_TIMEOUT_S)
    rates = {}
    for peer, (tokens, began), (tokens_then, ended) in zip(peers, before, after, strict=True):
        rates[peer.name] = (tokens_then - tokens) / (ended - began)
    return rates


def _computed(peer: SwarmPeer) -> tuple[int, float]:
    """Tokens that it has computed so far, and when that was."""
    return int(peer.status()["tokens"]), time.monotonic()
