"""Which of the rounds that peers committed became the swarm's history, and what happened to the others.

What lives here: the main chain, and the branches beside it: forks after a partition, and states that differ. What
does not: reading records (`commits`), what caused it all (`recovery`).

The main chain is followed backwards from the head that most survivors stand on. The logs on their disks name each
record's predecessor. For rounds that no log holds any more, those of an abandoned branch, or where there is no log,
the place where a peer was seen just before it committed a round stands in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from p2pllm_peers.lab.logs import DiskLog
from p2pllm_peers.lab.reporting.commits import Commit, Node, Sight
from p2pllm_peers.lab.reporting.recovery import Fault


@dataclass
class Branch:
    """Rounds in a row that some peers committed and the swarm did not keep.

    kind: "fork" if another roster committed them, "divergence" if the same roster led to another state. cause: index
    in the plan of the event that cut the peers off from each other; None if nothing did. rejoined: the first round
    of the main chain at which each of its peers was seen later; None if never.
    """

    kind: str
    cause: int | None
    commits: list[Commit]
    rejoined: dict[str, int | None] = field(default_factory=dict)
    rejoined_s: float | None = None

    @property
    def rounds(self) -> list[int]:
        """Its rounds, rising."""
        return sorted({commit.round for commit in self.commits})

    @property
    def peers(self) -> list[str]:
        """Who committed them."""
        return sorted({commit.peer for commit in self.commits})

    @property
    def by_round(self) -> list[Commit]:
        """One commit of each round."""
        return list({commit.round: commit for commit in sorted(self.commits, key=_order)}.values())


@dataclass(frozen=True)
class History:
    """main: digest of each round of the swarm's history, as far as it is known. branches: what was not kept."""

    main: dict[int, str]
    branches: list[Branch]

    @property
    def head(self) -> int:
        """The newest round."""
        return max(self.main, default=0)


def trace(
    seen: Mapping[str, list[Sight]],
    survivors: Iterable[str],
    struck: Sequence[Fault],
    names: Mapping[str, str],
    logs: Iterable[DiskLog] = (),
) -> History:
    """Tell the main chain from its branches.

    seen: all sights of each peer, by time. survivors: who was there at the end; all if nobody was. names: peer id ->
    name of the peer, as faults know it. logs: those that were on the peers' disks at the end.
    """
    commits: dict[Node, list[Commit]] = defaultdict(list)
    for row in seen.values():
        for sight in row:
            if sight.commit is not None:
                commits[sight.node].append(sight.commit)
    parents = _parents(seen) | _links(logs)
    last = [seen[peer][-1].node for peer in sorted(survivors) if seen.get(peer)]
    main = _main(last or [row[-1].node for row in seen.values() if row], commits, parents)
    branches = []
    for group in _groups(commits, parents, main):
        kind, cause = _kind(group[0], main, commits), _cause(group[0], main, commits, struck, names)
        branches.append(Branch(kind, cause, [commit for node in group for commit in commits[node]]))
        _find_return(branches[-1], seen, main)
    return History(main, sorted(branches, key=lambda branch: (branch.rounds[0], branch.peers)))


def _parents(seen: Mapping[str, list[Sight]]) -> dict[Node, Counter[str]]:
    """For each committed node: the states of the round before at which its members were seen last."""
    parents: dict[Node, Counter[str]] = defaultdict(Counter)
    for row in seen.values():
        before: Node = (0, "")
        now: Node = (0, "")
        for sight in row:
            if sight.node != now:
                before, now = now, sight.node
            if sight.commit is not None and before[0] == now[0] - 1 > 0:
                parents[now][before[1]] += 1
    return parents


def _links(logs: Iterable[DiskLog]) -> dict[Node, Counter[str]]:
    """The same from the logs, where it is no guess."""
    pairs = ((log.chain, round_) for log in logs for round_ in log.chain if round_ - 1 in log.chain)
    return {(round_, chain[round_]): Counter([chain[round_ - 1]]) for chain, round_ in pairs}


def _main(heads: list[Node], commits: dict[Node, list[Commit]], parents: dict[Node, Counter[str]]) -> dict[int, str]:
    """The chain on which most of `heads` lie; of equals the longest, then the smallest digest."""
    if not heads:
        return {}
    chains = {head: _chain(head, commits, parents) for head in set(heads)}

    def rank(head: Node) -> tuple[int, int, str]:
        support = sum(1 for round_, digest in heads if chains[head].get(round_) == digest)
        return (-support, -head[0], head[1])

    return chains[min(chains, key=rank)]


def _chain(head: Node, commits: dict[Node, list[Commit]], parents: dict[Node, Counter[str]]) -> dict[int, str]:
    """All rounds down from a head; where no member was seen at the round before, what most committed."""
    at_round: dict[int, list[Node]] = defaultdict(list)
    for node in commits:
        at_round[node[0]].append(node)
    lower = sorted((number for number in at_round if number < head[0]), reverse=True)
    chain = {head[0]: head[1]}
    node = head
    while True:
        votes = parents.get(node)
        if votes:
            node = (node[0] - 1, min(votes, key=lambda digest: (-votes[digest], digest)))
        else:
            below = next((number for number in lower if number < node[0]), None)
            if below is None:
                return chain
            node = min(at_round[below], key=lambda other: (-len(commits[other]), commits[other][0].time_s, other))
        chain[node[0]] = node[1]


def _groups(
    commits: dict[Node, list[Commit]], parents: dict[Node, Counter[str]], main: dict[int, str]
) -> list[list[Node]]:
    """The nodes beside the main chain, each joined to the one that it stands on; every group rises."""
    group_of: dict[Node, list[Node]] = {}
    groups = []
    for node in sorted(node for node in commits if main.get(node[0]) != node[1]):
        votes = parents.get(node, Counter())
        before = min(votes, key=lambda digest: (-votes[digest], digest), default=None)
        group = group_of.get((node[0] - 1, before)) if before is not None else None
        if group is None:
            group = []
            groups.append(group)
        group.append(node)
        group_of[node] = group
    return groups


def _kind(first: Node, main: dict[int, str], commits: dict[Node, list[Commit]]) -> str:
    kept = commits.get((first[0], main.get(first[0], "")))
    return "divergence" if kept and kept[0].members == commits[first][0].members else "fork"


def _cause(
    first: Node,
    main: dict[int, str],
    commits: dict[Node, list[Commit]],
    struck: Sequence[Fault],
    names: Mapping[str, str],
) -> int | None:
    """The cut that held while the round was made, and whose victims are in one of the two rosters only."""
    kept = commits.get((first[0], main.get(first[0], "")), [])
    if _kind(first, main, commits) == "divergence":
        return None
    ours = {names.get(member, member) for member in commits[first][0].members}
    theirs = {names.get(member, member) for commit in kept[:1] for member in commit.members}
    for fault in struck:
        until = float("inf") if fault.undone_s is None else fault.undone_s
        held = any(fault.at_s <= commit.time_s and commit.began_s <= until for commit in commits[first])
        if fault.do in ("cut", "partition") and held and set(fault.victims) & (ours ^ theirs):
            return fault.event
    return None


def _find_return(branch: Branch, seen: Mapping[str, list[Sight]], main: dict[int, str]) -> None:
    """When each of its peers was seen on the main chain again."""
    times = []
    for peer in branch.peers:
        left = max(commit.time_s for commit in branch.commits if commit.peer == peer)
        back = next((s for s in seen[peer] if s.time_s > left and main.get(s.node[0]) == s.node[1]), None)
        branch.rejoined[peer] = None if back is None else back.node[0]
        times.append(None if back is None else back.time_s)
    known = [time_s for time_s in times if time_s is not None]
    branch.rejoined_s = max(known) if known and len(known) == len(times) else None


def _order(commit: Commit) -> tuple[int, float, str]:
    return (commit.round, commit.time_s, commit.peer)
