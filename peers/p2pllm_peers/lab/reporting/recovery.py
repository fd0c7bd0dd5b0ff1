"""What befell the peers and how the swarm got over it, from what was struck and when peers came and went.

What lives here: faults with their victims and their end, what state each peer was in at any time, and how long a
recovery took. What does not: planning and striking faults (`timeline`, `faults`), forks (`history`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pllm_peers.lab.evidence import Facts, PeerFacts, Strike, Struck
from p2pllm_peers.lab.reporting.commits import Commit
from p2pllm_peers.lab.scenario import OPPOSITE
from p2pllm_peers.lab.timeline import aimed_at

TAKES_AWAY = frozenset({"kill", "stop", "freeze", "cut", "partition", "pause"})
"""Faults after which a victim cannot commit with all the others; it comes back when they are undone."""

_STILL_THERE = ("freeze", "cut", "partition", "pause")
"""Those of them that leave the peer's processes alive."""


@dataclass(frozen=True)
class Fault:
    """One fault that was carried out. event: its index in the plan. undone_s: None if nothing undid it.

    splits: it came between peers, so that none of its victims is away from all the others.
    """

    event: int
    do: str
    victims: tuple[str, ...]
    cut_off: tuple[str, ...]  # those of them who lost the way to most of the others
    at_s: float
    undone_s: float | None
    splits: bool
    struck: Struck

    def active(self, time_s: float) -> bool:
        """Whether it held at that time."""
        return self.at_s <= time_s < (float("inf") if self.undone_s is None else self.undone_s)


def faults(facts: Facts) -> list[Fault]:
    """The faults that were carried out, in the order in which they struck."""
    done = carried_out(facts)
    found = []
    for place, (struck, strike) in enumerate(done):
        if (strike.do in OPPOSITE or strike.do == "corrupt") and not _sets_free(strike, facts):
            later = done[place + 1 :]
            undone = next((row.at_s for row, other in later if _undoes(other, strike, facts)), None)
            if undone is not None and OPPOSITE.get(strike.do) == "restart":
                undone = _restarted(strike.peer, struck.at_s, undone, facts)
            there = [peer.name for peer in facts.peers if _is_there(peer, struck.at_s)]
            found.append(_fault(struck, strike, undone, there))
    return found


def carried_out(facts: Facts) -> list[tuple[Struck, Strike]]:
    """What was carried out, in order of time, with the victims of what waited for a phase."""
    specs = {spec.name: spec for spec in facts.scenario.peer_specs()}
    done = sorted((row for row in facts.struck if not row.error), key=lambda row: (row.at_s, row.event))
    planned = [(row, facts.events[row.event]) for row in done]
    return [(row, aimed_at(strike, specs[row.peer]) if row.peer else strike) for row, strike in planned]


def _restarted(name: str, at_s: float, due_s: float, facts: Facts) -> float | None:
    """When the restart that was due began: it waits until the peer is gone; None if that was after the end."""
    ends = [ended_s for peer in facts.peers if peer.name == name for ended_s in peer.ended_s if ended_s >= at_s]
    began_s = max([due_s, *sorted(ends)[:1]])
    return None if 0 < facts.ended_s < began_s else began_s


def _fault(struck: Struck, strike: Strike, undone: float | None, there: list[str]) -> Fault:
    """Of a partition, all who are there are victims; all but the largest group (of equals, the first) are cut off."""
    groups = strike.args.get("groups") or []
    if groups:
        largest = max(groups, key=len)
        apart = tuple(name for group in groups if group is not largest for name in group)
        return Fault(struck.event, strike.do, tuple(there), apart, struck.at_s, undone, True, struck)
    other = strike.args.get("other")
    victims = tuple(name for name in (strike.peer, other) if name)
    cut_off = () if other else victims
    return Fault(struck.event, strike.do, victims, cut_off, struck.at_s, undone, bool(other), struck)


def _sets_free(strike: Strike, facts: Facts) -> bool:
    """A machine gets back the share of a core that it began with."""
    before = {peer.name: peer.cores for peer in facts.peers}
    return strike.do == "slow_machine" and strike.args.get("cores") == before.get(strike.peer)


def _undoes(later: Strike, fault: Strike, facts: Facts) -> bool:
    if (fault.do, later.do) == ("freeze", "kill"):  # the dead are not frozen, nor is who comes back
        return later.peer == fault.peer
    if later.do != OPPOSITE.get(fault.do) or (later.do == "slow_machine" and not _sets_free(later, facts)):
        return False
    return fault.do == "partition" or (later.peer, later.args.get("other")) == (fault.peer, fault.args.get("other"))


def recoveries(
    struck: Sequence[Fault],
    commits: Mapping[str, list[Commit]],
    main: Mapping[int, str],
    names: Mapping[str, str],
    end_s: float,
) -> list[dict[str, Any]]:
    """For each fault how long the others, and its victims, took to commit again; see `report` for the fields.

    names: of the peers, by peer id.
    """
    everything = sorted(itertools.chain.from_iterable(commits.values()), key=lambda commit: commit.time_s)
    common = [commit for commit in everything if main.get(commit.round) == commit.record_digest]
    own = [commit for commit in common if commit.peer in {names.get(member) for member in commit.members}]
    return [_recovery(fault, everything, own, end_s) for fault in struck]


def calm_rounds(
    recoveries: Sequence[dict[str, Any]], rounds: Sequence[dict[str, Any]], end_s: float
) -> dict[int, float]:
    """Seconds of each round, by number, from one commit to the next, that no fault touched.

    A fault touches the rounds from when it strikes until its victims are back, or for good if they never are although
    it was undone. One that nothing undoes touches them until the others commit again.
    """
    spans = [(row["at_s"], _over(row, end_s)) for row in recoveries]
    found = {}
    for before, after in itertools.pairwise(row for row in rounds if row["time_s"] >= 0):
        begin, end = before["time_s"], after["time_s"]
        if after["round"] == before["round"] + 1 and not any(since < end and begin < until for since, until in spans):
            found[after["round"]] = end - begin
    return found


def stalls(
    recoveries: Sequence[dict[str, Any]], commits: Mapping[str, list[Commit]], calm: Iterable[int]
) -> list[float | None]:
    """For each fault what the round under way and the next one took the others, beside computing.

    More precisely by how much it was more than the median of the rounds that no fault touched, seconds, for the slower
    one of the two and of the others. So time to compute, which is longer with less machines, is not in it.
    """
    everything = sorted(itertools.chain.from_iterable(commits.values()), key=lambda commit: commit.time_s)
    untouched = set(calm)
    usual = [commit.overhead_s for commit in everything if commit.round in untouched]
    return [_stall(row, everything, statistics.median(usual)) if usual else None for row in recoveries]


def _stall(row: dict[str, Any], everything: list[Commit], usual_s: float) -> float | None:
    first = row["survivors_round"]
    if first is None:
        return None
    others = (commit for commit in everything if commit.time_s > row["at_s"] and commit.peer not in row["victims"])
    return max((c.overhead_s for c in others if first <= c.round <= first + 1), default=usual_s) - usual_s


def _over(row: dict[str, Any], end_s: float) -> float:
    back_s = row["undone_s"] if row["away"] else row["at_s"]
    lasts = [row["undone_s"] or 0.0, row["at_s"] + (end_s if row["survivors_s"] is None else row["survivors_s"])]
    if back_s is not None:
        lasts.append(end_s if row["return_s"] is None else back_s + row["return_s"])
    return float(max(lasts))


def _recovery(fault: Fault, everything: list[Commit], common: list[Commit], end_s: float) -> dict[str, Any]:
    not_others = () if fault.splits else fault.victims
    known = max((commit.round for commit in everything if commit.time_s <= fault.at_s), default=0)
    new = (c for c in everything if c.time_s > fault.at_s and c.round > known and c.peer not in not_others)
    after = next(new, None)
    back_s = fault.undone_s if fault.do in TAKES_AWAY else fault.at_s
    returned = None if back_s is None else _return(fault.victims, common, back_s)
    return {
        "event": fault.event,
        "do": fault.do,
        "victims": list(fault.victims),
        "phase": fault.struck.phase,
        "round": fault.struck.round,
        "age_s": fault.struck.age_s,
        "away": fault.do in TAKES_AWAY,
        "at_s": fault.at_s,
        "undone_s": fault.undone_s,
        "watched_s": max(0.0, end_s - fault.at_s),
        "survivors_s": None if after is None else after.time_s - fault.at_s,
        "survivors_round": None if after is None else after.round,
        "return_s": None if returned is None or back_s is None else returned.time_s - back_s,
        "return_round": None if returned is None else returned.round,
    }


def _return(victims: tuple[str, ...], common: list[Commit], back_s: float) -> Commit | None:
    """The commit with which the last of the victims was a member of the swarm's rounds again.

    common: of the swarm's rounds, those of their members.
    """
    firsts = [
        next((commit for commit in common if commit.peer == victim and commit.time_s > back_s), None)
        for victim in victims
    ]
    found = [commit for commit in firsts if commit is not None]
    return max(found, key=lambda commit: commit.time_s) if found and len(found) == len(firsts) else None


State = dict[str, Any]
"""{"state": "up" | "frozen" | "cut" | "paused" | "starting" | "down", "from_s", "to_s"}."""


def timeline(facts: Facts, struck: Sequence[Fault], end_s: float) -> dict[str, list[State]]:
    """What state each peer was in from when it first started to the end."""
    return {peer.name: _states(peer, facts, struck, end_s) for peer in facts.peers}


def _states(peer: PeerFacts, facts: Facts, struck: Sequence[Fault], end_s: float) -> list[State]:
    mine = [fault for fault in struck if peer.name in fault.cut_off and fault.do in _STILL_THERE]
    strikes = [(row.at_s, strike) for row, strike in carried_out(facts)]
    starts = [at_s for at_s, strike in strikes if strike.do in ("restart", "join") and strike.peer == peer.name]
    marks = {*peer.ready_s, *peer.ended_s, *starts, *(fault.at_s for fault in mine)}
    marks |= {fault.undone_s for fault in mine if fault.undone_s is not None}
    first = min([*peer.ready_s, *starts], default=end_s)
    joins = any(strike.do == "join" and strike.peer == peer.name for strike in facts.events)
    begun = starts if joins else [float("-inf"), *starts]
    times = sorted({time_s for time_s in marks if first <= time_s < end_s} | {end_s})
    states: list[State] = []
    for from_s, to_s in itertools.pairwise(times):
        state = _state_at(peer, mine, begun, from_s)
        if states and states[-1]["state"] == state:
            states[-1]["to_s"] = to_s
        else:
            states.append({"state": state, "from_s": from_s, "to_s": to_s})
    return states


def _is_there(peer: PeerFacts, time_s: float) -> bool:
    """Whether a process of the peer was ready, frozen or not."""
    ready = max((at for at in peer.ready_s if at <= time_s), default=None)
    return ready is not None and not any(ready <= at <= time_s for at in peer.ended_s)


def _state_at(peer: PeerFacts, mine: list[Fault], begun: list[float], time_s: float) -> str:
    if not _is_there(peer, time_s):
        # counted, as a restart may be due before the peer has left, or even before it was ready
        lives, ends = (sum(1 for at in times if at <= time_s) for times in (begun, peer.ended_s))
        return "starting" if lives > ends else "down"
    active = {fault.do for fault in mine if fault.active(time_s)}
    if active & {"cut", "partition"} and "freeze" not in active:
        return "cut"
    return "frozen" if "freeze" in active else "paused" if active else "up"
