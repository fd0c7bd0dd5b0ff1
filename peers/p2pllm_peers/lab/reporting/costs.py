"""What each peer cost: bytes by the counters of its interface and by its own, CPU time, and its share of the work.

What lives here: adding up counters that begin anew with every process of a peer. What does not: reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from p2pllm_peers.lab.evidence import Facts, PeerFacts, PeerSample, Sample
from p2pllm_peers.lab.reporting.commits import STALE_S, Commit

KINDS = ("control", "updates", "state")
"""Kinds of a peer's own payload: calls, all-reduce, and the states and aggregates of those who catch up."""


def costs(
    facts: Facts, samples: Sequence[Sample], commits: Mapping[str, list[Commit]], main: Mapping[int, str]
) -> list[dict[str, Any]]:
    """One row a peer, in the order of the facts; see `report` for the fields."""
    kept = {commit.round: commit for row in commits.values() for commit in row if _is_kept(commit, main)}
    rows = [_cost(peer, samples, commits.get(peer.name, []), kept, main) for peer in facts.peers]
    return [row | {"bits_per_parameter": _bits(row, facts.parameters)} for row in rows]


def _is_kept(commit: Commit, main: Mapping[int, str]) -> bool:
    return main.get(commit.round) == commit.record_digest


def _cost(
    peer: PeerFacts, samples: Sequence[Sample], own: list[Commit], kept: Mapping[int, Commit], main: Mapping[int, str]
) -> dict[str, Any]:
    mine = {commit.round: commit for commit in own if _is_kept(commit, main)}
    samples_given, tokens = _contributed(peer, kept)
    seen = [(sample.t, sample.peers[peer.name]) for sample in samples if peer.name in sample.peers]
    traffic = _traffic(peer, seen, own)
    payload = {way: _payload(traffic, way) for way in ("sent", "received")}
    wire = {"up": _largest(seen, lambda row: row.wire_up), "down": _largest(seen, lambda row: row.wire_down)}
    up = payload["sent"] if wire["up"] is None else wire["up"]
    down = payload["received"] if wire["down"] is None else wire["down"]
    return {
        "name": peer.name,
        "peer_id": peer.peer_id,
        "cores": peer.cores,
        "link": peer.link,
        "alone_tokens_per_s": peer.alone_tokens_per_s,
        "rounds": len(mine),
        "samples": samples_given,
        "tokens": tokens,
        "cpu_s": _largest(seen, lambda row: row.cpu_s),
        "wire": wire,
        "own": traffic,
        "payload": payload,
        "bytes_per_round": {"up": _ratio(up, len(mine)), "down": _ratio(down, len(mine))},
        "bytes_per_token": {"up": _ratio(up, tokens), "down": _ratio(down, tokens)},
    }


def _bits(row: Mapping[str, Any], parameters: int) -> dict[str, float | None]:
    """What the peer sent in a round in the mean: its updates, all its payload, and all on the wire with headers."""
    sent = {"updates": row["own"].get("updates_sent"), "payload": row["payload"]["sent"], "wire": row["wire"]["up"]}
    return {
        what: _ratio(None if count is None else 8 * count, row["rounds"] * parameters) for what, count in sent.items()
    }


def _contributed(peer: PeerFacts, kept: Mapping[int, Commit]) -> tuple[int, int]:
    """Samples and tokens that went into the swarm's rounds, also where the peer died before it could record one."""
    samples = tokens = 0
    for commit in kept.values():
        given = sum(commit.members.get(peer_id, 0) for peer_id in {peer.peer_id, *peer.former_ids})
        samples += given
        tokens += given * commit.tokens // commit.samples if commit.samples else 0
    return samples, tokens


def _traffic(peer: PeerFacts, seen: list[tuple[float, PeerSample]], own: list[Commit]) -> dict[str, int]:
    """The peer's own counters, added up over its processes, each of which began at zero."""
    said = [(time_s, row.traffic) for time_s, row in seen if row.phase]
    best: dict[tuple[int, str], int] = {}
    for time_s, counters in [*said, *((commit.time_s, commit.traffic) for commit in own)]:
        begun = [ready_s for ready_s in peer.ready_s if ready_s <= time_s]
        if len(begun) > 1 and time_s < begun[-1] + STALE_S:
            continue  # still what the process before has said
        life = max(1, len(begun))  # the first one may have said something before it was ready
        for key, value in counters.items():
            best[life, key] = max(best.get((life, key), 0), value)
    total: dict[str, int] = {}
    for (_, key), value in sorted(best.items()):
        total[key] = total.get(key, 0) + value
    return total


def _payload(traffic: Mapping[str, int], way: str) -> float | None:
    """Bytes of all kinds one way; None if the peer never told."""
    return _sum(traffic.get(f"{kind}_{way}") for kind in KINDS)


def _largest(
    seen: list[tuple[float, PeerSample]], value: Callable[[PeerSample], float | int | None]
) -> float | int | None:
    """The last value of a counter that only rises; None if it never could be read."""
    return max((number for _, row in seen if (number := value(row)) is not None), default=None)


def _ratio(amount: float | None, by: float) -> float | None:
    return amount / by if amount is not None and by else None


def together(rows: Sequence[dict[str, Any]], rounds: int, tokens: int) -> dict[str, Any]:
    """Bytes of all peers, each byte counted once, where it was sent; CPU seconds, where they were read.

    source: "wire", "own" (payload, as each peer counts it) or None. total, per_round (of those recorded), per_token:
    by that source. payload: by the peers' own counters. cpu_s. All since the first process was started.
    """
    on_wire = [row["wire"]["up"] for row in rows]
    by_peers = [row["payload"]["sent"] for row in rows]
    source = "wire" if any(value is not None for value in on_wire) else "own"
    total = _sum(on_wire if source == "wire" else by_peers)
    return {
        "source": source if total is not None else None,
        "total": total,
        "payload": _sum(by_peers),
        "per_round": _ratio(total, rounds),
        "per_token": _ratio(total, tokens),
        "cpu_s": _sum(row["cpu_s"] for row in rows),
    }


def _sum(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
