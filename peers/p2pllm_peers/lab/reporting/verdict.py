"""The verdict: what a scenario asks for against what its report says, one check a line.

Pure. A check that cannot be made has failed and says why: nothing passes because nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p2pllm_peers.lab.reporting.lines import DELAY_TOLERANCE_MS, RATE_TOLERANCE
from p2pllm_peers.lab.reporting.words import branch_in_words, count, fault_in_words, in_words, spans
from p2pllm_peers.lab.scenario import Verdict

Report = dict[str, Any]

MOST_EFFICIENT = 1.2
"""A swarm cannot make more than its peers alone; so much is left to noise."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold. name, wanted and measured are for people."""

    name: str
    wanted: str
    measured: str
    passed: bool


def judge(report: Report, limits: Verdict) -> list[Check]:
    """All checks of a scenario, in a fixed order; those whose limit is left out are not made.

    Three are always made: with lines other than asked for, a fault that could not be struck or a peer that crashed by
    itself, it was another scenario.
    """
    checks = [_links(report), _events(report), _crashes(report)]
    if limits.no_divergence:
        checks.append(_divergence(report))
    if limits.agree_at_end:
        checks.append(_agreement(report))
    if limits.nothing_lost:
        checks.append(_lost(report))
    if limits.max_rounds_behind is not None:
        checks.append(_behind(report, limits.max_rounds_behind))
    if limits.min_rounds is not None:
        checks.append(_rounds(report, limits.min_rounds))
    if limits.max_validation_loss is not None:
        checks.append(_loss(report, limits.max_validation_loss))
    if limits.min_efficiency is not None:
        checks.append(_efficiency(report, limits.min_efficiency))
    if limits.max_recovery_s is not None:
        checks.append(_recovery(report, limits.max_recovery_s))
    checks += [_survivors(report, do, limit) for do, limit in limits.survivors_within_s.items()]
    checks += [_stalls(report, do, limit) for do, limit in limits.stalls_within_s.items()]
    checks += [_returns(report, do, limit) for do, limit in limits.returns_within_s.items()]
    if limits.min_pace:
        checks.append(_pace(report, limits.min_pace))
    if limits.max_idle is not None:
        checks.append(_idle(report, limits.max_idle))
    if limits.min_attendance is not None:
        checks.append(_attendance(report, limits.min_attendance))
    if limits.nothing_left:
        checks.append(_left(report))
    return checks


def _links(report: Report) -> Check:
    name = "links"
    wanted = (
        f"measured as asked for, rates within {RATE_TOLERANCE:.0%}, "
        f"delays within {DELAY_TOLERANCE_MS:g} ms or {RATE_TOLERANCE:.0%}"
    )
    if not report["links"]:
        return Check(name, wanted, "none", True)
    judged = [row for row in report["links"] if row["passed"] is not None]
    wrong = [row for row in judged if not row["passed"]]
    if wrong:
        first = wrong[0]
        what = f"{first['peer']} {first['what']} {first['measured']:.1f} for {first['asked']:g} {first['unit']}"
        return Check(name, wanted, f"{len(wrong)} of {len(judged)} differ, first {what}", False)
    return Check(name, wanted, f"{len(judged)} of {len(judged)}", True)


def _events(report: Report) -> Check:
    name, wanted = "events carried out", "each that came due"
    failed = [row for row in report["struck"] if row["error"]]
    if failed:
        first = failed[0]
        what = f"{in_words(report['events'][first['event']])} at {first['at_s']:.0f} s: {first['error']}"
        return Check(name, wanted, f"{len(failed)} of {len(report['struck'])} failed, first {what}", False)
    return Check(name, wanted, f"{len(report['struck'])} of {len(report['events'])} planned", True)


def _crashes(report: Report) -> Check:
    found = [f"{peer['name']}: {text}" for peer in report["peers"] for text in peer["crashes"]]
    measured = f"{len(found)}, first {found[0]}" if found else "none"
    return Check("crashes", "none but those of the plan", measured, not found)


def _divergence(report: Report) -> Check:
    name = "no divergence"
    wanted = "equal states after every round that several recorded; if not, repaired by the next"
    if not report["rounds"]:
        return Check(name, wanted, "no round was committed", False)
    shared = [set(row["digests"].values()) for row in report["rounds"] if len(row["digests"]) > 1]
    if not shared and len(report["peers"]) > 1:
        return Check(name, wanted, "no round was recorded by two peers, so there is nothing to compare", False)
    apart = [row for row in report["branches"] if row["kind"] == "divergence" or row["cause"] is None]
    bad = [row for row in apart if row["kind"] == "fork" or not row["repaired"]]
    stuck = [row for row in report["branches"] if row not in apart and not row["repaired"] and _was_mended(report, row)]
    if bad or stuck:
        return Check(name, wanted, "; ".join(branch_in_words(row) for row in bad + stuck), False)
    equal = sum(1 for states in shared if len(states) == 1)
    others = "".join(f"; {branch_in_words(row)}" for row in report["branches"])
    return Check(name, wanted, f"equal in {equal} of {len(shared)} shared rounds{others}", True)


def _was_mended(report: Report, branch: dict[str, Any]) -> bool:
    """Whether the cut behind a fork ended early enough for its peers to come back."""
    ended = next((row["undone_s"] for row in report["recoveries"] if row["event"] == branch["cause"]), None)
    settling = {row["name"] for row in report["at_end"] if row["settling"]}
    return ended is not None and not set(branch["peers"]) <= settling


def _agreement(report: Report) -> Check:
    name, wanted = "agreement at the end", "one state among peers at one round"
    states: dict[int, dict[str, list[str]]] = {}
    for row in (row for row in _present(report) if row["round"]):
        states.setdefault(row["round"], {}).setdefault(row["digest"], []).append(row["name"])
    if not states:
        return Check(name, wanted, "no peer had a committed round at the end", False)
    split = {number: list(groups.values()) for number, groups in states.items() if len(groups) > 1}
    if split:
        number, groups = max(split.items())
        return Check(name, wanted, f"round {number}: {' / '.join(', '.join(group) for group in groups)}", False)
    return Check(name, wanted, f"{sum(len(g) for row in states.values() for g in row.values())} peers agree", True)


def _lost(report: Report) -> Check:
    name, wanted = "nothing lost", "every committed round is in the survivors' history"
    if not report["rounds"]:
        return Check(name, wanted, "no round was committed", False)
    logs = {row["name"]: report["logs"].get(row["name"]) for row in _present(report)}
    torn = [name for name, log in logs.items() if log and (log["missing"] or log["problem"])]
    if torn:
        return Check(name, wanted, f"the log on the disk of {', '.join(torn)} is not whole", False)
    abandoned = f"; {count(len(report['abandoned']), 'round')} abandoned after a cut" if report["abandoned"] else ""
    if report["lost"]:
        return Check(name, wanted, f"lost: {spans(report['lost'])}{abandoned}", False)
    return Check(name, wanted, f"none of {report['swarm']['rounds']} rounds{abandoned}", True)


def _behind(report: Report, limit: int) -> Check:
    name, wanted = "distance from the head", f"at most {count(limit, 'round')} at the end"
    there = _present(report)
    if not report["rounds"] or not there:
        reason = "no peer was there at the end" if report["rounds"] else "no round was committed"
        return Check(name, wanted, reason, False)
    worst = max(there, key=lambda row: int(row["behind"]))
    left_out = [row["name"] for row in report["at_end"] if row not in there]
    note = f"; not counted: {', '.join(left_out)}" if left_out else ""
    who = f"{worst['name']} is {count(worst['behind'], 'round')} behind" if worst["behind"] else "all are at the head"
    return Check(name, wanted, who + note, worst["behind"] <= limit)


def _present(report: Report) -> list[dict[str, Any]]:
    """Peers that can be expected at the head: done, or there, reachable, and not just back from trouble."""
    return [row for row in report["at_end"] if row["state"] in ("up", "starting", "done") and not row["settling"]]


def _rounds(report: Report, limit: int) -> Check:
    done = report["swarm"]["rounds"]
    return Check("rounds", f"at least {limit}", str(done), done >= limit)


def _loss(report: Report, limit: float) -> Check:
    loss = report["swarm"]["final_validation_loss"]
    measured = "never measured" if loss is None else f"{loss:.4f} nats a token"
    return Check("validation loss", f"at most {limit:g} nats a token", measured, loss is not None and loss <= limit)


def _efficiency(report: Report, limit: float) -> Check:
    swarm = report["swarm"]
    share = swarm["efficiency"]
    if share is None:
        return Check("efficiency", f"at least {limit:.0%}", f"not measured: {swarm['why_no_efficiency']}", False)
    told = f"{share:.1%}, {swarm['tokens_per_s']:,.0f} of {swarm['alone_tokens_per_s']:,.0f} tokens/s"
    if share > MOST_EFFICIENT:
        return Check(
            "efficiency", f"at least {limit:.0%}", f"{told}: no swarm can, so a speed is measured wrong", False
        )
    return Check("efficiency", f"at least {limit:.0%}", told, share >= limit)


def _recovery(report: Report, limit: float) -> Check:
    """Faults after which the run ended within the limit, and without a commit, tell nothing."""
    name, wanted = "recovery", f"the others commit again at most {limit:g} s after any fault"
    rows = report["recoveries"]
    if not rows:
        return Check(name, wanted, "no fault was struck", False)
    never = [row for row in rows if row["survivors_s"] is None and row["watched_s"] > limit]
    if never:
        return Check(name, wanted, f"never after {fault_in_words(never[0])}", False)
    known = [row for row in rows if row["survivors_s"] is not None]
    if not known:
        return Check(name, wanted, "the run ended before anybody could commit again", False)
    worst = max(known, key=lambda row: float(row["survivors_s"]))
    seconds = worst["survivors_s"]
    told = f"{seconds:.1f} s at most, after {fault_in_words(worst)}; {count(len(known), 'fault')}"
    return Check(name, wanted, told, seconds <= limit)


def _survivors(report: Report, do: str, limit: float) -> Check:
    name = f"next commit after {do.replace('_', ' ')}"
    wanted = f"at most {limit:g} s beyond a round without faults"
    calm_s = report["swarm"]["calm_round_s"]
    rows = [row for row in report["recoveries"] if row["do"] == do]
    if calm_s is None or not rows:
        return Check(name, wanted, "no such fault was struck" if not rows else "no round was without faults", False)
    never = [row for row in rows if row["delay_s"] is None and row["watched_s"] > limit + calm_s]
    known = [row for row in rows if row["delay_s"] is not None]
    if never or not known:
        return Check(name, wanted, f"never after {fault_in_words((never or rows)[0])}", False)
    worst = max(known, key=lambda row: float(row["delay_s"]))
    told = f"{worst['delay_s']:.1f} s at most beyond {calm_s:.1f} s, after {fault_in_words(worst)}"
    return Check(name, wanted, f"{told}; {count(len(known), 'fault')}", worst["delay_s"] <= limit)


def _stalls(report: Report, do: str, limit: float) -> Check:
    name, wanted = f"stall after {do.replace('_', ' ')}", f"at most {limit:g} s of a round beside computing"
    known = [row for row in report["recoveries"] if row["do"] == do and row["stall_s"] is not None]
    if not known:
        return Check(name, wanted, "not measured: no such fault, or no round without faults", False)
    worst = max(known, key=lambda row: float(row["stall_s"]))
    told = f"{worst['stall_s']:.1f} s at most, after {fault_in_words(worst)}; {count(len(known), 'fault')}"
    return Check(name, wanted, told, worst["stall_s"] <= limit)


def _returns(report: Report, do: str, limit: float) -> Check:
    """From when a fault was undone; those that nothing undid, or so late that there was no time, tell nothing."""
    name, wanted = f"return after {do.replace('_', ' ')}", f"a member of a committed round again within {limit:g} s"
    end_s = report["run"]["ended_s"]
    rows = [row for row in report["recoveries"] if row["do"] == do and row["undone_s"] is not None]
    never = [row for row in rows if row["return_s"] is None and end_s - row["undone_s"] > limit]
    known = [row for row in rows if row["return_s"] is not None]
    if never or not known:
        return Check(name, wanted, f"never after {fault_in_words(never[0])}" if never else "nobody came back", False)
    worst = max(known, key=lambda row: float(row["return_s"]))
    told = f"{worst['return_s']:.1f} s at most, after {fault_in_words(worst)}; {count(len(known), 'fault')}"
    return Check(name, wanted, told, worst["return_s"] <= limit)


def _pace(report: Report, limit: float) -> Check:
    swarm = report["swarm"]
    name, wanted = "pace", f"at least {limit:.0%} of the rounds without faults in the same time"
    if swarm["pace"] is None:
        return Check(name, wanted, "not measured: no round was without faults", False)
    told = f"{swarm['pace']:.1%}, peers were up {swarm['share_up']:.1%} of the time"
    return Check(name, wanted, told, swarm["pace"] >= limit)


def _idle(report: Report, limit: float) -> Check:
    """What no part of a round explains (`commits.PARTS`), by all of a peer's time; of each peer that there was."""
    name, wanted = "idle", f"at most {limit:.0%} of any peer's time is explained by no part of a round"
    shares: dict[str, float] = {}
    for peer in (row["name"] for row in report["peers"]):
        parts = report["anatomy"]["peers"].get(peer, {})
        whole = sum(part["mean"] for part in parts.values())
        if "idle" not in parts or not whole:
            return Check(name, wanted, f"{peer} recorded no round with its time", False)
        shares[peer] = parts["idle"]["mean"] / whole
    worst = max(shares, key=lambda peer: (shares[peer], peer))
    return Check(name, wanted, f"{worst} {shares[worst]:.1%}, no other more", shares[worst] <= limit)


def _attendance(report: Report, limit: float) -> Check:
    name, wanted = "attendance", f"every peer a member of at least {limit:.0%} of the rounds"
    rounds = [set(row["members"]) for row in report["rounds"]]
    present = {peer["name"]: sum(peer["name"] in members for members in rounds) for peer in report["peers"]}
    if not rounds or not present:
        return Check(name, wanted, "no round was committed", False)
    worst = min(present, key=lambda peer: (present[peer], peer))
    told = f"{worst} in {present[worst]} of {len(rounds)}, the others in as many or more"
    return Check(name, wanted, told, present[worst] >= limit * len(rounds))


def _left(report: Report) -> Check:
    name, wanted = "nothing left", "no process, socket, namespace or cgroup"
    if not report["run"]["ended"]:
        return Check(name, wanted, "the run did not come to its end, so nobody looked", False)
    left = report["left_over"]
    return Check(name, wanted, "; ".join(left) if left else "nothing", not left)
