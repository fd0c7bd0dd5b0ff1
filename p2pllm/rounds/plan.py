"""The decisions of the round protocol as pure functions of what a peer knows.

No clock, no network, no state: every function maps values to a value, so that each rule can be read and tested
alone. The shells that gather the values and act on the answers are `roster`, `vote` and `loop`.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from p2pllm.rounds.messages import Phase, Roster, Status

Head = tuple[int, bytes]
"""(round, digest of the state): what a peer has committed."""

TAKING_PART: frozenset[Phase] = frozenset({"collecting", "roster", "exchange", "vote", "commit"})
"""Phases in which a peer works on the round after its head."""

FINISHING: frozenset[Phase] = frozenset({"vote", "commit"})
"""Phases in which a peer is about to reach the next head."""


def taking_part(head: Head, statuses: Mapping[str, Status]) -> frozenset[str]:
    """Peers whose updates for the round after `head` are to be waited for.

    A peer that is one head behind and about to commit counts too: it will be at `head` in a moment, and a
    round that closed without it would waste its work.
    """
    return frozenset(
        peer
        for peer, status in statuses.items()
        if (status.head == head and status.phase in TAKING_PART)
        or (status.round == head[0] - 1 and status.phase in FINISHING)
    )


def gathered(head: Head, statuses: Mapping[str, Status]) -> int:
    """Samples that the swarm has gathered towards the round after `head`."""
    return sum(status.samples for status in statuses.values() if status.head == head and status.phase in TAKING_PART)


def ranked(run_id: str, head: Head, peers: Iterable[str]) -> list[str]:
    """Order of leadership for the round after `head`: the same on every peer, another one every round."""
    seed = f"{run_id}/{head[0]}/".encode() + head[1]
    return sorted(peers, key=lambda peer: blake3(seed + peer.encode()).digest())


def group_id(run_id: str, roster: Roster) -> bytes:
    """Name of one attempt to average with one roster, 32 bytes."""
    return blake3(run_id.encode() + roster.pack()).digest()


class Verdict(enum.Enum):
    """What the votes say."""

    WAIT = "wait"
    COMMIT = "commit"
    RETRY = "retry"


@dataclass(frozen=True)
class Decision:
    """A verdict and, for COMMIT, the digest that more than half of the roster holds."""

    verdict: Verdict
    aggregate: bytes = b""


def decide(members: Iterable[str], votes: Mapping[str, bytes], absent: frozenset[str]) -> Decision:
    """Judge the votes of a roster; `absent` will not vote any more. Empty votes hold no aggregate.

    An aggregate commits when more than half of the roster holds it. Once no aggregate can reach that, retry.
    """
    roster = tuple(members)
    counts = Counter(votes[peer] for peer in roster if votes.get(peer))
    top, support = max(counts.items(), key=lambda item: (item[1], item[0]), default=(b"", 0))
    if 2 * support > len(roster):
        return Decision(Verdict.COMMIT, top)
    open_votes = sum(1 for peer in roster if peer not in votes and peer not in absent)
    if 2 * (support + open_votes) > len(roster):
        return Decision(Verdict.WAIT)
    return Decision(Verdict.RETRY)


def head_to_follow(own: Head | None, statuses: Mapping[str, Status]) -> Head | None:
    """The head that we should move to, or None where ours is as good as any.

    own: our head; None if we hold no state yet.

    The head with the most peers behind it wins, ourselves included; ties go to the later round, then to the
    smaller digest. So one peer with a wild claim moves nobody as long as two agree, and a peer that diverged
    finds itself in the minority. The round just before ours is no candidate: whoever is there is about to
    commit what we have committed. Two exceptions keep fresh peers harmless: nobody who trained goes back to
    round 0, and whoever is at round 0 goes to any later round.
    """
    support = Counter(
        status.head
        for status in statuses.values()
        if status.phase not in ("starting", "joining") and (own is None or status.round != own[0] - 1)
    )
    if own is not None:
        support[own] += 1
    fresh = own is None or own[0] == 0
    if not fresh or any(round_ > 0 for round_, _ in support):
        support = Counter({head: count for head, count in support.items() if head[0] > 0})
    if not support:
        return None
    best = min(support, key=lambda head: (-support[head], -head[0], head[1]))
    return None if best == own else best


def donors(head: Head, statuses: Mapping[str, Status]) -> list[str]:
    """Peers that hold `head`, to fetch it from."""
    return sorted(peer for peer, status in statuses.items() if status.head == head and status.phase != "joining")
