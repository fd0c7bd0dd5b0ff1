"""Ledger: what a simulation saw, the record that is made of it, and what can be said of that in few or plain words.

What does not live here: the simulation (`simulator`).
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from p2pllm.averaging import Group
from p2pllm.averaging.attempt import STREAM_METHOD
from p2pllm.averaging.dense import NOTICE_METHOD
from p2pllm.metrics import RoundRecord
from p2pllm.network.table import MAX_MEMBERS
from p2pllm.rounds.messages import MAX_ROSTER
from p2pllm.testing.host import MemoryHost

KINDS = {
    "beat": "beats", "leave": "beats", "enrol": "enrol", "roster": "roster", "vote": "vote",
    STREAM_METHOD: "exchange control", NOTICE_METHOD: "exchange control", "fetch": "catching up",
}  # fmt: skip
"""What a method's messages are called in the record."""

WITHIN = ("roster", "exchange", "vote", "outer_step", "digest")
"""Parts of a round that are not compute."""


@dataclass
class _Tried:
    """One roster, as its members used it."""

    round: int
    size: int
    at: float


@dataclass
class _Round:
    """What is known of one round of the run."""

    first_commit: float = float("inf")
    present: int = 0  # peers that were there at the first commit
    rosters: dict[str, int] = field(default_factory=dict)  # digest of the aggregate -> members
    branches: Counter[str] = field(default_factory=Counter)  # state after it -> who committed that
    committed: set[int] = field(default_factory=set)  # numbers of peers
    outside_s: list[float] = field(default_factory=list)


@dataclass
class Traffic:
    """Messages and bytes by kind of all peers together, and the seconds that they lived, up to one moment."""

    peer_seconds: float = 0.0
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, hosts: Iterable[MemoryHost], peer_seconds: float) -> Traffic:
        """What all hosts have sent so far; a reply is a message, too."""
        sums: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS.values()}
        for host in hosts:
            for method, count in host.sent.items():
                kind = sums[KINDS[method]]
                kind[0] += count.messages
                kind[1] += count.bytes
        return cls(peer_seconds, {kind: (messages, size) for kind, (messages, size) in sums.items()})

    def since(self, before: Traffic) -> dict[str, dict[str, float]]:
        """Messages and bytes a peer a second since another moment, by kind."""
        seconds = self.peer_seconds - before.peer_seconds
        rates = {}
        for kind, (messages, size) in self.kinds.items():
            old_messages, old_size = before.kinds.get(kind, (0, 0))
            rates[kind] = {
                "messages": round((messages - old_messages) / seconds, 3) if seconds else 0.0,
                "bytes": round((size - old_size) / seconds, 1) if seconds else 0.0,
            }
        return rates


class Ledger:
    """Rosters and commits as they come, and what becomes of peers."""

    def __init__(self, rounds: int) -> None:
        self.tried: dict[bytes, _Tried] = {}
        self.faults: Counter[str] = Counter()
        self.caught_up = 0
        self.present = 0
        """Peers that are there now."""
        self._in_first: set[str] = set()
        self._rounds = {number: _Round() for number in range(1, rounds + 1)}

    @property
    def first_roster_s(self) -> float | None:
        """When the first roster of several was used."""
        return min((tried.at for tried in self.tried.values() if tried.size > 1), default=None)

    @property
    def first_commit_s(self) -> float:
        """When the first peer had committed a round; infinity if none has."""
        return min(row.first_commit for row in self._rounds.values())

    def attempt(self, group: Group, round_: int, now: float) -> None:
        """A member begins an exchange for the round after `round_`."""
        self.tried.setdefault(group.group_id, _Tried(round_ + 1, len(group.members), now))
        if round_ == 0 and len(group.members) > 1:
            self._in_first.update(group.members)

    def commit(self, number: int, record: RoundRecord, now: float) -> None:
        """Peer `number` has committed a round."""
        row = self._rounds[record.round]
        if now < row.first_commit:
            row.first_commit, row.present = now, self.present
        row.rosters[record.aggregate_digest] = len(record.members)
        row.branches[record.state_digest] += 1
        row.committed.add(number)
        row.outside_s.append(sum(record.seconds.get(part, 0.0) for part in WITHIN))

    def by_round(self) -> list[dict[str, Any]]:
        """One record a round that anybody committed."""
        tried: defaultdict[int, int] = defaultdict(int)
        for each in self.tried.values():
            tried[each.round] += 1
        return [
            {
                "round": number,
                "at_s": round(row.first_commit, 3),
                "peers": len(row.committed),
                "present": row.present,
                "left_out": max(0, row.present - len(row.committed)),
                "rosters": len(row.rosters),
                "largest_roster": max(row.rosters.values()),
                "alone": sum(1 for size in row.rosters.values() if size == 1),
                "branches": len(row.branches),
                "main_branch": round(max(row.branches.values()) / row.branches.total(), 4),
                "failed_attempts": max(0, tried[number] - len(row.rosters)),
                "outside_s": round(statistics.median(row.outside_s), 3),
                "outside_longest_s": round(max(row.outside_s), 3),
            }
            for number, row in self._rounds.items()
            if row.committed
        ]

    def rounds(self, started: int) -> dict[str, Any]:
        """The rounds in a few numbers."""
        rows = self.by_round()
        first = self.first_roster_s
        return {
            "first_roster_s": None if first is None else round(first, 3),
            "in_first_rosters": round(len(self._in_first) / started, 4),
            "rounds_committed": sum(1 for row in rows if 2 * row["peers"] > row["present"]),
            "outside_s": statistics.median(row["outside_s"] for row in rows) if rows else None,
            "rosters_a_round": statistics.median(row["rosters"] for row in rows) if rows else 0,
            "most_branches": max((row["branches"] for row in rows), default=0),
            "failed_attempts": sum(row["failed_attempts"] for row in rows),
            "left_out": sum(row["left_out"] for row in rows),
            "caught_up": self.caught_up,
            "faults": dict(sorted(self.faults.items())),
            "by_round": rows,
        }


def sent_a_second(result: Mapping[str, Any]) -> tuple[float, float]:
    """Messages and bytes of all kinds that a peer sends a second: after the first round, or up to the end if there is
    nothing after it.
    """
    after = result["training"].values()
    rates = after if any(rate["messages"] for rate in after) else result["forming"].values()
    return sum(rate["messages"] for rate in rates), sum(rate["bytes"] for rate in rates)


def islands(links: Mapping[str, frozenset[str]]) -> list[int]:
    """Sizes of the parts of a swarm that know nothing of each other, the largest first.

    links: whom each peer takes for alive.
    """
    sizes, left = [], dict.fromkeys(links)
    both_ways: dict[str, set[str]] = {peer: set(others) for peer, others in links.items()}
    for peer, others in links.items():
        for other in others & links.keys():
            both_ways[other].add(peer)
    while left:
        edge = [left.popitem()[0]]
        size = 0
        while edge:
            peer = edge.pop()
            size += 1
            for other in both_ways[peer]:
                if other in left:
                    del left[other]
                    edge.append(other)
        sizes.append(size)
    return sorted(sizes, reverse=True)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the numbers of one size mean where they are not what one would wish, and why."""
    peers, known = result["peers"], result["known"]
    found = []
    if peers - 1 > MAX_MEMBERS:
        found.append(
            f"A peer knows at most {MAX_MEMBERS} others (the member table's bound), so none sees all {peers:,}. A peer "
            f"whose table is full of living members refuses further ones: {result['turned_away']:,} found no room "
            "at all and wait for some."
        )
    if peers > MAX_ROSTER and result["rosters_a_round"] > 1:
        found.append(
            f"A roster holds at most {MAX_ROSTER}. Leaders that do not see each other's rosters close several for one "
            f"round ({result['rosters_a_round']:g} here), each with an aggregate of its own."
        )
    if result["most_branches"] > 1:
        found.append(
            f"Rounds were committed with up to {result['most_branches']} different outcomes. A peer then follows the "
            "state that most of those whom it sees hold, and drops its own."
        )
    if known["share"] < 0.99:
        found.append(
            f"At the end a peer knew {known['share']:.1%} of those that it could have known, the least one "
            f"{known['least']}."
        )
    if known["islands"] > 1:
        found.append(
            f"The swarm was in {known['islands']} parts that know nothing of each other; the largest held "
            f"{known['largest_island']:.1%} of the peers."
        )
    if not result["complete"]:
        found.append(f"Stopped after {result['virtual_s']:g} virtual seconds, before all peers had done all rounds.")
    return found
