"""The decisions of the round protocol as pure functions of what a peer knows.

No clock, no network, no state: every function maps values to a value, so that each rule can be read and
tested alone. The shells that gather the values and act on the answers are `roster`, `vote`, `round`, `loop`.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from p2pllm.rounds.chain import Branch
from p2pllm.rounds.messages import Enrol, Phase, Roster, Status
from p2pllm.rounds.record import Head

TAKING_PART: frozenset[Phase] = frozenset({"collecting", "roster", "exchange", "vote", "commit"})
"""Phases in which a peer works on the round after its head."""

FINISHING: frozenset[Phase] = frozenset({"vote", "commit"})
"""Phases in which a peer is about to reach the next head."""

CLOSING: frozenset[Phase] = frozenset({"roster", "exchange", "vote"})
"""Phases in which a peer's update for the round is ready. Not "commit": a new head is evaluated in it."""


NEAR_ROUNDS = 8
"""A peer that lacks at most so many rounds may ask the others to wait until it has them."""


def at_head(head: Head, statuses: Mapping[str, Status]) -> frozenset[str]:
    """Peers that work on the round after `head`: one of them leads it."""
    round_, digest = head
    return frozenset(
        peer
        for peer, status in statuses.items()
        if status.round == round_ and status.digest == digest and status.phase in TAKING_PART
    )


def taking_part(head: Head, statuses: Mapping[str, Status]) -> frozenset[str]:
    """Peers whose updates for the round after `head` are to be waited for.

    A peer that is one head behind and about to commit counts too, and one that arrives: it will be at `head` in a
    moment, and a round that closed without it would waste its work.
    """
    return at_head(head, statuses) | frozenset(
        peer
        for peer, status in statuses.items()
        if (status.round == head[0] - 1 and status.phase in FINISHING)
        or (0 < head[0] - status.round <= NEAR_ROUNDS and status.phase == "arriving")
    )


def gathered(head: Head, statuses: Mapping[str, Status]) -> int:
    """Samples that the swarm has gathered towards the round after `head`."""
    return sum(statuses[peer].samples for peer in at_head(head, statuses))


def worth_telling(untold: int, peers: int, gathered: int, target: int) -> bool:
    """Whether the others should hear at once of samples that they do not know of yet, not with the next heartbeat.

    Each of so many peers may have as many untold: together at least half of what the round still lacks. So a round is
    told of more and more often towards its end, and it ends about when it has its samples.
    """
    return untold > 0 and 2 * untold * peers >= target - gathered


def is_over(head: Head, others: Mapping[str, Status]) -> bool:
    """More than half of the others at our head have their updates ready: to gather more is to be left out."""
    working = at_head(head, others)
    return 2 * sum(1 for peer in working if others[peer].phase in CLOSING) > len(working)


def is_collected(
    samples: int, gathered: int, target: int, *, deadline_passed: bool, others_are_over: bool, paused: bool, alone: bool
) -> bool:
    """Whether a peer ends its inner steps for a round that the swarm has not left.

    samples: ours. gathered, target: samples that the swarm has, and that the manifest wants. others_are_over: as of
    `is_over`. paused: we shall compute nothing more. alone: nobody else would close the round.
    """
    if paused and (not samples or alone):
        return True
    return samples > 0 and (gathered >= target or deadline_passed or others_are_over)


def is_minority(present: Iterable[str], former: frozenset[str]) -> bool:
    """Fewer than half of a roster's members are here. Half of two go on: one of them is likely dead."""
    return 2 * len(former & set(present)) < len(former)


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
    """A verdict and, for COMMIT, the body that more than half of the roster voted for."""

    verdict: Verdict
    body: bytes = b""


def decide(members: Iterable[str], votes: Mapping[str, bytes], absent: frozenset[str]) -> Decision:
    """Judge the votes of a roster; `absent` will not vote any more. Empty votes hold no body.

    A body commits when more than half of the roster voted for it. Once none can reach that, retry.
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


def culprits(
    me: str,
    members: Iterable[str],
    votes: Mapping[str, bytes],
    failed: frozenset[str],
    accused: Mapping[str, frozenset[str]],
) -> frozenset[str]:
    """Whom a failed attempt speaks against, ourselves never; it may be an honest one, so one attempt is no proof.

    votes: of the attempt, ours included. failed, accused: of the exchange, see ExchangeResult.

    Own sight goes first: who did not vote although it mattered, who holds anything else than we do, or who
    failed in our exchange. Else the one that most of the others name, else who gave up and named nobody.
    """
    roster = tuple(members)
    others = frozenset(roster) - {me}
    mattered = decide(roster, votes, frozenset()).verdict is Verdict.WAIT
    seen = failed | (others - votes.keys() if mattered else frozenset())
    if own := votes.get(me):
        seen |= {peer for peer, vote in votes.items() if vote != own}
    if seen & others:
        return seen & others
    named = Counter(peer for group in accused.values() for peer in group & others)
    if named:
        return frozenset({max(named, key=lambda peer: (named[peer], peer))})
    return others & accused.keys()


def suspects(members: tuple[str, ...], accused: frozenset[str]) -> frozenset[str]:
    """Whom the next attempt hardly waits for, and has not lead: of the culprits of the last one, if they are the fewer.

    Half of a roster that did without the other half could be either of two halves.
    """
    return accused if 2 * len(accused) < len(members) else frozenset()


def proposal(enrolments: Mapping[str, Enrol], failed: frozenset[bytes] = frozenset()) -> bytes:
    """The body that a new attempt settles instead of exchanging anew; empty if no member holds any but `failed` ones.

    What a member has voted for may have been committed by one that is gone since, so it goes first. Of several, the
    one that most hold; ties go to the greater digest.
    """
    held = Counter(enrol.holding for enrol in enrolments.values() if enrol.holding and enrol.holding not in failed)
    return max(held, key=lambda body: (held[body], body), default=b"")


def speaks_for(proposed: Iterable[str], roster: Iterable[str]) -> bool:
    """Whether more than half of a roster are members of a proposal that it is to settle.

    Else one member could decide every round with a proposal of itself alone.
    """
    members = frozenset(roster)
    return 2 * len(members & frozenset(proposed)) > len(members)


def branch_to_follow(own: Branch | None, statuses: Mapping[str, Status]) -> Branch | None:
    """The branch that we should move to, or None where ours is as good as any.

    own: ours; None if we hold no state yet. The best branch wins, see `chain`: one that goes on where we are is
    better than ours, too. Whoever claims it must show it before anything is changed. Round 0 has nothing behind it,
    so nobody who trained goes back there, and whoever is there goes anywhere else.
    """
    claimed = {status.branch for status in statuses.values() if status.phase not in ("starting", "joining")}
    best = max(claimed, key=lambda branch: branch.rank, default=None)
    if best is None or (own is not None and best.rank <= own.rank):
        return None
    return best


def donors(branch: Branch, statuses: Mapping[str, Status]) -> list[str]:
    """Peers to fetch `branch` from: those that claim it first, then those that are further along."""
    found = {
        peer: status.branch.rank for peer, status in statuses.items() if status.phase not in ("starting", "joining")
    }
    return sorted((peer for peer in found if found[peer] >= branch.rank), key=lambda peer: (found[peer], peer))


def may_arrive(own: Branch | None, branch: Branch, tries: int) -> bool:
    """Whether a peer that moves to `branch` asks the others to wait for it; they do, for a bounded time.

    It does if a few rounds are all that it lacks: where catching up takes as long as these did, it would be behind for
    good. tries: how often that was so since it was last in a record. Others pay for it, so it asks the first time, the
    second, the fourth, the eighth and so on.
    """
    return is_near(own, branch) and tries & (tries + 1) == 0


def is_near(own: Branch | None, branch: Branch) -> bool:
    """Few rounds lead from our head to that of `branch`."""
    return own is not None and 0 < branch.head[0] - own.head[0] <= NEAR_ROUNDS


class Step(enum.Enum):
    """What a peer does next."""

    WAIT_FOR_ROOM = "wait for room"
    FOLLOW = "follow"
    SEE_OFF = "see off"
    PAUSE = "pause"
    TRAIN = "train"


def next_step(
    own: Branch | None, last_round: int, statuses: Mapping[str, Status], *, turned_away: bool, paused: bool
) -> Step:
    """The one decision of the main loop. turned_away: the swarm has no room for us. paused: the user wants a rest."""
    if paused:
        return Step.PAUSE
    if turned_away:
        return Step.WAIT_FOR_ROOM
    if own is None or branch_to_follow(own, statuses) is not None:
        return Step.FOLLOW
    return Step.SEE_OFF if own.head[0] >= last_round else Step.TRAIN
