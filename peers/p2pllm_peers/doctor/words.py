"""Words: findings and verdict for people, a line a check. Pure; what is printed how is the command's business."""

from __future__ import annotations

from typing import Any, NamedTuple

from p2pllm_peers.doctor.findings import Findings
from p2pllm_peers.doctor.judge import (
    LEAST_SHARE,
    WORST_CLOCK_S,
    Verdict,
    disk_short,
    memory_fit,
    share_of_swarm,
    upload_seconds,
)


class Check(NamedTuple):
    """mark: "ok", "weak", "no", or "-" for what was not checked."""

    name: str
    mark: str
    text: str


def checks(found: Findings) -> list[Check]:
    """Every check, in the order of the table; that of the text only if it is missing."""
    return [
        _device(found),
        _memory(found),
        _speed(found),
        _traffic(found),
        _upload(found),
        _disk(found),
        *_text(found),
        _clock(found),
        _reach(found),
        _arithmetic(found),
        Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
    ]


def heading(found: Findings) -> str:
    """What the machine is judged for."""
    run, outside = found.run, found.outside
    if not run.known:
        return f"This machine for the run file {run.name} ({run.strategy})"
    now = (
        f", round {outside.round} of {outside.rounds}, {outside.peers} peer{'s' if outside.peers > 1 else ''}"
        if outside.peers
        else ""
    )
    return f"This machine for run {run.name} {run.run_id[:16]} ({run.strategy}{now})"


def as_json(found: Findings, verdict: Verdict) -> dict[str, Any]:
    """The one object of `--json`; `findings` says what is in it."""
    return {
        "can_take_part": verdict.can_take_part,
        "would_help": verdict.would_help,
        "reason": verdict.reason,
        "helps_most": verdict.most,
        "advice": verdict.advice,
        "memory_fit": memory_fit(found),
        "swarm_share": share_of_swarm(found),
        "upload_s_per_round": upload_seconds(found),
        "disk_needed_bytes": found.disk.home_bytes + found.disk.text_bytes,
        "disk_missing_bytes": disk_short(found),
        **found.to_json(),
    }


def _device(found: Findings) -> Check:
    compute = found.compute
    if compute.failure:
        return Check("device", "no", compute.failure)
    return Check("device", "ok", f"{compute.device}, {compute.parameters / 1e6:,.1f} M parameters")


def _memory(found: Findings) -> Check:
    memory, fit = found.memory, memory_fit(found)
    if found.compute.failure:
        return Check("memory", "-", f"{size(memory.free_bytes)} free")
    parts = (
        ("parameters", memory.parameters_bytes),
        ("gradients", memory.gradients_bytes),
        ("inner optimizer", memory.inner_optimizer_bytes),
        ("outer", memory.outer_optimizer_bytes),
        (f"activations of {found.compute.micro_batch}", memory.activations_bytes),
    )
    named = ", ".join(f"{name} {size(amount)}" for name, amount in parts if amount)
    text = f"fits: {fit}; needs {size(memory.needed_bytes)} of {size(memory.free_bytes)} free ({named})"
    return Check("memory", {"yes": "ok", "no": "no"}.get(fit, "weak"), text)


def _speed(found: Findings) -> Check:
    compute, share = found.compute, share_of_swarm(found)
    if compute.failure:
        return Check("speed", "-", "not measured")
    text = f"{compute.tokens_per_s:,.0f} tokens/s, measured over {compute.measured_s:.1f} s"
    if share is None:
        return Check("speed", "ok", text)
    of = f"; the swarm makes {found.outside.swarm_tokens_per_s:,.0f}, so {share:.1%} of it with this machine"
    return Check("speed", "ok" if share >= LEAST_SHARE else "weak", text + of)


def _traffic(found: Findings) -> Check:
    traffic = found.traffic
    if found.compute.failure:
        return Check("traffic", "-", "not known without a speed")
    whose = f"{traffic.members} members" if traffic.measured else f"{traffic.members} such machines, assumed"
    return Check(
        "traffic",
        "ok",
        f"{traffic.up_mb_per_hour:,.0f} MB an hour up, {traffic.down_mb_per_hour:,.0f} down "
        f"({whose}, rounds of {traffic.round_s:,.1f} s)",
    )


def _upload(found: Findings) -> Check:
    mbit, seconds = found.outside.upload_mbit, upload_seconds(found)
    if not mbit or seconds is None:
        return Check("line up", "-", f"not checked: {_why_not(found)}")
    said = "set with --upload" if found.outside.upload_limited else "measured at least"
    late = seconds > found.traffic.round_s
    text = f"{mbit:,.1f} Mbit/s {said}; the bytes of a round take {seconds:,.1f} s"
    return Check("line up", "no" if late else "weak" if seconds > found.traffic.round_s / 2 else "ok", text)


def _disk(found: Findings) -> Check:
    disk = found.disk
    if not found.compute.parameters:
        return Check("disk", "-", f"not known without a model; {size(disk.home_free_bytes)} free")
    parts = (
        ("states", disk.snapshots_bytes),
        ("aggregates", disk.aggregates_bytes),
        ("log", disk.log_bytes),
        ("optimizer", disk.optimizer_bytes),
        ("text", disk.text_bytes),
    )
    named = ", ".join(f"{name} {size(amount)}" for name, amount in parts if amount)
    total = disk.home_bytes + disk.text_bytes
    already = disk.home_here_bytes + disk.text_here_bytes
    here = f", {size(already)} of it here already" if already else ""
    text = f"needs {size(total)} at most ({named}){here}; {size(disk.home_free_bytes)} free"
    return Check("disk", "no" if disk_short(found) else "ok", text)


def _text(found: Findings) -> list[Check]:
    return [Check("text", "no", found.disk.text_problem)] if found.disk.text_problem else []


def _clock(found: Findings) -> Check:
    outside = found.outside
    if outside.clock_skew_s is None:
        return Check("clock", "-", f"not checked: {_why_not(found)}")
    off = abs(outside.clock_skew_s) - outside.clock_error_s
    mark = "no" if off > WORST_CLOCK_S else "weak" if off > WORST_CLOCK_S / 2 else "ok"
    return Check(
        "clock", mark, f"{outside.clock_skew_s:+,.2f} s off the peers', give or take {outside.clock_error_s:.2f}"
    )


def _reach(found: Findings) -> Check:
    outside = found.outside
    if outside.how is None:
        return Check("reachable", "-", f"not checked: {_why_not(found)}")
    if outside.how == "direct":
        return Check(
            "reachable", "ok", f"a peer dialled back {outside.seen_as} port {outside.port} ({outside.scope}): open"
        )
    shut = f"no connection to {outside.seen_as} port {outside.port} from outside ({outside.scope})"
    if not outside.seen_as:
        shut = "the peers that were asked see no address of it"
    if outside.how == "relay":
        return Check("reachable", "weak", f"behind NAT, through a relay; {shut}")
    return Check("reachable", "weak", f"outgoing only; {shut}")


def _arithmetic(found: Findings) -> Check:
    if found.arithmetic_problem:
        return Check("arithmetic", "no", found.arithmetic_problem)
    return Check("arithmetic", "ok", "the outer step gives the same bits as everywhere")


def _why_not(found: Findings) -> str:
    return found.outside.why_not or "no peer could be asked"


def size(amount: float) -> str:
    """Bytes as people write them."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= least:
            return f"{amount / least:,.1f} {unit}"
    return f"{amount:,.0f} B"
