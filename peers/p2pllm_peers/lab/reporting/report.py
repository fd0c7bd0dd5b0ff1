"""What a run of the lab did, in numbers: `report(evidence)` is a pure function of what the run left in its folder.

Times are seconds on the lab's clock, which began when the first peers were ready; losses are nats a token; None is
what was not measured. Nothing that was recorded after the end (`ended_s`), while the peers were leaving, counts.
The report is JSON:

    version         of this format
    run             name, about, seed, short, interrupted, p2pllm (version), cpus, ended (it came to
                    its end), ended_s, emulator, scenario
    swarm           rounds (number of the head), recorded_rounds, tokens, samples, abandoned_tokens, final_loss,
                    final_validation_loss, round_interval_s (median), completed (the run's last round was reached),
                    steady (span without warm-up: from_s, to_s, tokens), tokens_per_s (of that span), alone_tokens_per_s
                    (sum over the peers), efficiency, why_no_efficiency, bytes (see `costs.together`),
                    overhead_s (median of a round outside compute, validation and idle), calm_round_s (median of the
                    rounds that no fault touched), pace (rounds by those of a run without faults, as long),
                    share_up (of the peers' time)
    rounds          the swarm's history: round, time_s (first record), loss, validation_loss, samples, tokens,
                    tokens_so_far, members (names), attempts (largest), digests (peer -> digest)
    reached         first time at each tenth of a nat of validation loss: validation_loss, time_s, tokens, round
    peers           name, peer_id, cores, link, alone_tokens_per_s, rounds (that it committed), samples and tokens (that
                    it gave), cpu_s, wire {up, down}, own {<control|updates|state>_<sent|received>}, payload {sent,
                    received}, bytes_per_round and bytes_per_token (of its own rounds and tokens, on the wire if that
                    was measured) {up, down}, bits_per_parameter (sent in one of its rounds, to all members together)
                    {updates, payload, wire}, crashes, log
    parts           a row a peer and round: peer, round, time_s, and seconds of each of `commits.PARTS`
    anatomy         swarm and peers[name]: part -> {median, mean, max}
    links           peer, what, unit, asked, measured, tolerance, passed (None: not judged)
    events          the planned list and nothing measured: the same seed gives the same
    struck          what became of them: event, at_s, error
    recoveries      a fault each: event, do, victims, at_s, undone_s, watched_s (how long the run went on), phase, round
                    and age_s (what the victim had said last, see `evidence.Struck`), survivors_s and survivors_round
                    (their next new commit), delay_s (survivors_s without calm_round_s; below 0: the round had begun
                    before), stall_s (see `recovery.stalls`), return_s and return_round (the last victim's first commit
                    in the swarm's history as a member, from when it was undone; where the victim was never away, from
                    the fault; None if never), away (whether the victims were)
    branches        committed beside the history: kind, cause (event), rounds, peers, from_s, to_s, tokens, rejoined
                    (peer -> round), rejoined_s, repaired
    diverged, lost, abandoned    rounds with differing states; rounds missing in the history, without and with a cut
    at_end          name, state (or "done": it ended after the run's last round), round, digest, behind (rounds to the
                    head), settling (trouble ended just before)
    timeline        name -> [{state, from_s, to_s}]
    logs            on a peer's disk at the end: name -> round, rounds_of_history (how many of these), missing (rounds),
                    abandoned (other records), problem (why it cannot be read)
    left_over, notes, checks and passed (the verdict, see `verdict.Check`)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from p2pllm_peers.lab.evidence import Evidence, Facts
from p2pllm_peers.lab.logs import DiskLog
from p2pllm_peers.lab.reporting.commits import PARTS, Commit, Sight, read_commits, sights
from p2pllm_peers.lab.reporting.costs import costs, together
from p2pllm_peers.lab.reporting.history import Branch, History, trace
from p2pllm_peers.lab.reporting.lines import link_rows
from p2pllm_peers.lab.reporting.progress import pace, reached, rounds_of, speed
from p2pllm_peers.lab.reporting.recovery import State, calm_rounds, faults, recoveries, stalls, timeline
from p2pllm_peers.lab.reporting.verdict import judge
from p2pllm_peers.lab.reporting.words import amount, branch_in_words, count, duration, share, size, source

VERSION = 1

SETTLE_S = 30.0
"""A peer whose trouble ended so short before the end may still be catching up."""

START_S = 120.0
"""A slow machine may take so long from the start of a process until it takes part."""

Row = dict[str, Any]


def report(evidence: Evidence) -> Row:
    """Everything that can be said about a run; see the module's docstring for the fields."""
    facts = evidence.facts
    read = {name: read_commits(name, rows, facts.began_unix) for name, rows in evidence.records.items()}
    end_s = facts.ended_s or _last_sign(evidence, [commit for rows, _ in read.values() for commit in rows])
    commits = {name: [commit for commit in rows if commit.time_s <= end_s] for name, (rows, _) in read.items()}
    seen = {name: sights(name, rows, evidence.samples, end_s) for name, rows in commits.items()}
    struck, names = faults(facts), _names(facts)
    states = timeline(facts, struck, end_s)
    ends = {name: _end(row, seen.get(name, []), facts) for name, row in states.items()}
    living = [name for name, end in ends.items() if end["state"] in ("up", "starting", "done")]
    there = [name for name, end in ends.items() if end["state"] not in ("down", "never there")]
    history = trace(seen, living, struck, names, evidence.logs.values())
    rounds = rounds_of(commits, history, names)
    completed = history.head >= facts.scenario.run.round.rounds
    parts = [
        {"peer": name, "round": commit.round, "time_s": commit.time_s, **commit.parts()}
        for name, rows in commits.items()
        for commit in rows
    ]
    peers = costs(facts, evidence.samples, commits, history.main)
    last_s = min(end_s, rounds[-1]["time_s"]) if completed and rounds else end_s
    damaged = [f"The records of {name} have {count(bad, 'damaged line')}." for name, (_, bad) in read.items() if bad]
    recovered = recoveries(struck, commits, history.main, names, last_s)
    calm = calm_rounds(recovered, rounds, end_s)
    found = {
        "version": VERSION,
        "run": _run(facts, end_s),
        "swarm": _totals(rounds, history, parts)
        | {"completed": completed, "bytes": together(peers, len(rounds), sum(row["tokens"] for row in rounds))}
        | speed(rounds, facts)
        | pace(rounds, list(calm.values()))
        | {"share_up": _share_up(states, end_s)},
        "rounds": rounds,
        "reached": reached(rounds),
        "peers": [row | {"crashes": p.crashes, "log": p.log} for row, p in zip(peers, facts.peers, strict=True)],
        "parts": parts,
        "anatomy": {
            "swarm": _anatomy(parts),
            "peers": {name: _anatomy(row for row in parts if row["peer"] == name) for name in commits},
        },
        "links": [row for link in facts.links for row in link_rows(link)],
        "events": [strike.model_dump(mode="json") for strike in facts.events],
        "struck": [row.model_dump(mode="json") for row in facts.struck],
        "recoveries": [
            row | {"delay_s": _minus(row["survivors_s"], list(calm.values())), "stall_s": stall_s}
            for row, stall_s in zip(recovered, stalls(recovered, commits, calm), strict=True)
        ],
        "branches": [_branch(branch, there) for branch in history.branches],
        "diverged": _rounds(history, lambda branch: branch.kind == "divergence"),
        "lost": _rounds(history, lambda branch: branch.kind == "fork" and branch.cause is None),
        "abandoned": _rounds(history, lambda branch: branch.kind == "fork" and branch.cause is not None),
        "at_end": [_at_end(name, end, seen.get(name, []), history, end_s) for name, end in ends.items()],
        "timeline": states,
        "logs": {name: _log(log, history) for name, log in evidence.logs.items()},
        "left_over": facts.left_over,
        "notes": facts.notes + damaged,
    }
    checks = [asdict(check) for check in judge(found, facts.scenario.verdict)]
    return found | {"checks": checks, "passed": all(check["passed"] for check in checks)}


def summary_lines(report: Row) -> list[str]:
    """What a run did and whether its verdict holds, in about ten lines of plain text."""
    run = report["run"]
    ended = ", interrupted" if run["interrupted"] else ""
    lines = [f"{run['name']}: {duration(run['ended_s'])}, {count(len(report['peers']), 'peer')}{ended}"]
    if report["rounds"]:
        lines += _achieved(report)
    for do in dict.fromkeys(row["do"] for row in report["recoveries"]):
        rows = [row for row in report["recoveries"] if row["do"] == do]
        lines.append(f"{count(len(rows), do.replace('_', ' '))}: {_got_over(rows)}")
    judged = [row["passed"] for row in report["links"] if row["passed"] is not None]
    if judged:
        lines.append(f"links: {sum(judged)} of {len(judged)} measured values within tolerance")
    failed = [check for check in report["checks"] if not check["passed"]]
    lines.append(f"verdict: {'FAILED' if failed else 'passed'}, {len(failed)} of {len(report['checks'])} checks failed")
    lines += [f"FAILED {check['name']}: {check['measured']} (wanted: {check['wanted']})" for check in failed]
    return lines + [f"note: {note}" for note in report["notes"]]


def _got_over(rows: list[Row]) -> str:
    told = (("survivors_s", "others' next commit after"), ("delay_s", "beyond a round"), ("stall_s", "stalled for"),
            ("return_s", "back after"))  # fmt: skip
    known = [(words, [row[key] for row in rows if row[key] is not None]) for key, words in told]
    parts = [f"{words} {statistics.median(times):.1f} s, at most {max(times):.1f}" for words, times in known if times]
    return "; ".join(parts) or "nobody committed after it"


def _achieved(report: Row) -> list[str]:
    swarm, spent = report["swarm"], report["swarm"]["bytes"]
    rate = amount(swarm["tokens_per_s"], "tokens/s")
    rate += "" if swarm["efficiency"] is None else f", {share(swarm['efficiency'])} of what the peers make alone"
    losses = f"{amount(report['rounds'][0]['loss'], '')} -> {amount(swarm['final_loss'], '')}"
    apart = [branch_in_words(branch) for branch in report["branches"]]
    shared = sum(len(row["digests"]) > 1 for row in report["rounds"])
    parts = [f"{part} {row['mean']:.2f} s" for part, row in report["anatomy"]["swarm"].items()]
    return [
        f"rounds: {swarm['rounds']}, one in {amount(swarm['round_interval_s'], 's')} (median); {rate}",
        f"training loss: {losses}; validation loss: {amount(swarm['final_validation_loss'], '')} nats a token",
        f"bytes sent ({source(swarm)}): {size(spent['total'])}, {size(spent['per_round'])} a round, "
        f"{size(spent['per_token'])} a token",
        *_bits(report["peers"]),
        f"a round (mean): {', '.join(parts)}",
        f"states: {'; '.join(apart) or f'equal after {shared} of {shared} rounds that several peers recorded'}",
    ]


def _bits(peers: list[Row]) -> list[str]:
    """What the peers sent for each parameter and round, in the mean over them; no line where that is not known."""
    rows = [row["bits_per_parameter"] for row in peers]
    known = {what: [row[what] for row in rows if row[what] is not None] for what in ("updates", "payload", "wire")}
    parts = [f"{what} {statistics.fmean(values):.3g}" for what, values in known.items() if values]
    return [f"bits sent by a peer in a round, for each parameter (mean): {', '.join(parts)}"] if parts else []


def _minus(seconds: float | None, calm: list[float]) -> float | None:
    return None if seconds is None or not calm else seconds - statistics.median(calm)


def _share_up(states: dict[str, list[State]], end_s: float) -> float:
    """Of the time from the beginning to the end, times the peers that were there for it, what they were up."""
    rows = [(max(0.0, row["from_s"]), row["to_s"], row["state"]) for states_ in states.values() for row in states_]
    up = sum(to_s - from_s for from_s, to_s, state in rows if state == "up" and to_s > from_s)
    return up / (end_s * len(states)) if end_s and states else 0.0


def _log(log: DiskLog, history: History) -> Row:
    kept = sum(history.main.get(round_) == digest for round_, digest in log.chain.items())
    left = [[round_, digest] for round_, digest in log.abandoned if history.main.get(round_) != digest]
    numbers = {"missing": list(log.missing), "abandoned": left}
    return {"round": log.head, "rounds_of_history": kept, "problem": log.problem} | numbers


def _spread(values: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    lists: dict[str, list[float]] = {}
    for part, value in values:
        lists.setdefault(part, []).append(value)
    return {
        part: {"median": statistics.median(row), "mean": statistics.fmean(row), "max": max(row)}
        for part, row in lists.items()
    }


def _last_sign(evidence: Evidence, commits: list[Commit]) -> float:
    """The end of a run that could not write its own."""
    return max([0.0, *(sample.t for sample in evidence.samples), *(commit.time_s for commit in commits)])


def _names(facts: Facts) -> dict[str, str]:
    return {peer_id: peer.name for peer in facts.peers for peer_id in (peer.peer_id, *peer.former_ids) if peer_id}


def _run(facts: Facts, end_s: float) -> Row:
    return {
        "name": facts.scenario.name,
        "about": facts.scenario.about,
        "seed": facts.scenario.seed,
        "short": facts.short,
        "interrupted": facts.interrupted,
        "ended": facts.ended_s > 0,
        "ended_s": end_s,
        "p2pllm": facts.version,
        "cpus": facts.cpus,
        "emulator": facts.emulator.model_dump(mode="json"),
        "scenario": facts.scenario.model_dump(mode="json"),
    }


def _totals(rounds: list[Row], history: History, parts: list[Row]) -> Row:
    validated = [row["validation_loss"] for row in rounds if row["validation_loss"] is not None]
    outside = [sum(row[part] for part in ("roster", "exchange", "vote", "apply")) for row in parts]
    abandoned = [branch for branch in history.branches if branch.kind == "fork"]
    return {
        "rounds": history.head,
        "recorded_rounds": len(rounds),
        "tokens": sum(row["tokens"] for row in rounds),
        "samples": sum(row["samples"] for row in rounds),
        "abandoned_tokens": sum(commit.tokens for branch in abandoned for commit in branch.by_round),
        "final_loss": rounds[-1]["loss"] if rounds else None,
        "final_validation_loss": validated[-1] if validated else None,
        "overhead_s": statistics.median(outside) if outside else None,
    }


def _anatomy(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    return _spread((part, row[part]) for row in rows for part in PARTS if row[part] is not None)


def _branch(branch: Branch, there: list[str]) -> Row:
    """Repaired: whoever of its peers is still there was seen on the history again, after a divergence at once."""
    back = all(branch.rejoined[peer] is not None for peer in branch.peers if peer in there)
    return {
        "kind": branch.kind,
        "cause": branch.cause,
        "rounds": branch.rounds,
        "peers": branch.peers,
        "from_s": min(commit.time_s for commit in branch.commits),
        "to_s": max(commit.time_s for commit in branch.commits),
        "tokens": sum(commit.tokens for commit in branch.by_round),
        "rejoined": branch.rejoined,
        "rejoined_s": branch.rejoined_s,
        "repaired": back and (branch.kind == "fork" or len(branch.rounds) == 1),
    }


def _rounds(history: History, wanted: Callable[[Branch], bool]) -> list[int]:
    return sorted({number for branch in history.branches if wanted(branch) for number in branch.rounds})


def _end(states: list[State], seen: list[Sight], facts: Facts) -> State:
    """What became of a peer: its last state, or "done" for one that ended since no round was left to do."""
    if not states:
        return {"state": "never there", "from_s": 0.0}
    finished = bool(seen) and seen[-1].node[0] >= facts.scenario.run.round.rounds
    return {"state": "done", "from_s": 0.0} if finished and states[-1]["state"] == "down" else states[-1]


def _at_end(name: str, end: State, seen: list[Sight], history: History, end_s: float) -> Row:
    """Where a peer stood last; one on a branch is as far behind as its last round of the history."""
    common = [sight.node[0] for sight in seen if history.main.get(sight.node[0]) == sight.node[1]]
    last = seen[-1].node if seen else (0, "")
    on_main = bool(common) and history.main.get(last[0]) == last[1]
    state, since_s = end["state"], end["from_s"]
    return {
        "name": name,
        "state": state,
        "round": last[0],
        "digest": last[1],
        "behind": history.head - (last[0] if on_main else max(common, default=0)),
        "settling": since_s > 0 and end_s - since_s < (START_S if state == "starting" else SETTLE_S),
    }
