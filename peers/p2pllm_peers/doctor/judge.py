"""Judge: what follows from findings: whether the machine can take part, whether it helps, what would help most. Pure.

What would help most is the first of these that applies: it cannot take part, memory, disk, clock, upload, reachability,
compute, nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pllm_peers.doctor.findings import Findings

WORST_CLOCK_S = 60.0
"""By more than this no peer believes our records in the DHT; half of it is worth a word."""

LEAST_SHARE = 0.01
"""Of the swarm's tokens a second; below it a machine adds nothing that could be seen."""

SLOW_SHARE = 0.05
"""Below it a faster device would help most."""

SLOW_TOKENS_PER_S = 200.0
"""The same where no swarm is known to compare with: a CPU below it is worth a word."""

_MORE_MEMORY = "Free memory: close other programs, or choose another --device."
_LESS_WORK = "A faster --device, fewer other programs, or a run with a smaller model."


@dataclass(frozen=True)
class Verdict:
    """can_take_part: decides the exit code. would_help: it can, and the swarm would notice. reason: a sentence.

    most: what would help most: memory, text, arithmetic, disk, clock, upload, reachability, compute or nothing.
    advice: a sentence about that, with what to do.
    """

    can_take_part: bool
    would_help: bool
    reason: str
    most: str
    advice: str


def judge(found: Findings) -> Verdict:
    """The verdict. Whatever is not known counts as good."""
    blocked = _blocked(found)
    if blocked is not None:
        return Verdict(False, False, *blocked)
    most, advice = _most(found)
    useless = _useless(found)
    if useless:
        return Verdict(True, False, f"It can take part, but would not help: {useless}", most, advice)
    return Verdict(True, True, _contribution(found), most, advice)


def memory_fit(found: Findings) -> str:
    """ "yes", "with micro-batch N", or "no"."""
    memory, compute = found.memory, found.compute
    if compute.failure or memory.needed_bytes > memory.free_bytes:
        return "no"
    return f"with micro-batch {compute.micro_batch}" if compute.killed or compute.micro_batch_reduced else "yes"


def upload_seconds(found: Findings) -> float | None:
    """How long the bytes of a round take on the way up; None if the line was not measured."""
    mbit = found.outside.upload_mbit
    return None if not mbit else found.traffic.round_up_bytes * 8 / 1e6 / mbit


def share_of_swarm(found: Findings) -> float | None:
    """Of the tokens a second of the swarm with this machine, 0 to 1; None if no swarm is known."""
    swarm = found.outside.swarm_tokens_per_s
    return found.compute.tokens_per_s / (swarm + found.compute.tokens_per_s) if swarm > 0 else None


def disk_short(found: Findings) -> int:
    """Bytes that are missing on the fuller of the disks; 0 if all fits."""
    disk = found.disk
    if disk.same_disk:
        return max(0, disk.home_grows_bytes + disk.text_grows_bytes - disk.home_free_bytes)
    return max(0, disk.home_grows_bytes - disk.home_free_bytes, disk.text_grows_bytes - disk.cache_free_bytes)


def _blocked(found: Findings) -> tuple[str, str, str] | None:
    """(reason, most, advice) of what keeps the machine out."""
    compute, memory, outside = found.compute, found.memory, found.outside
    if found.arithmetic_problem:
        return found.arithmetic_problem, "arithmetic", "Another version of NumPy, or another machine."
    if found.disk.text_problem:
        return found.disk.text_problem, "text", "The run's text on this machine; name its place with --data."
    if compute.failure:
        most, what = ("memory", _MORE_MEMORY) if compute.killed else ("compute", _LESS_WORK)
        return compute.failure, most, what
    if memory.needed_bytes > memory.free_bytes:
        return (
            f"A peer of this run needs {_gb(memory.needed_bytes)} of memory, and {_gb(memory.free_bytes)} are free.",
            "memory",
            f"Free {_gb(memory.needed_bytes - memory.free_bytes)} of memory: close other programs.",
        )
    if short := disk_short(found):
        return (
            f"The run's files need {_gb(short)} more disk than is free.",
            "disk",
            f"Free {_gb(short)} of disk, or keep less with --disk.",
        )
    if outside.clock_skew_s is not None and _surely_off(found, WORST_CLOCK_S):
        return (
            f"This machine's clock is {abs(outside.clock_skew_s):,.0f} s off, so peers do not believe its records.",
            "clock",
            "Set the clock, or let the system keep it (NTP).",
        )
    return None


def _most(found: Findings) -> tuple[str, str]:
    """(code, sentence) of what would help most, for a machine that can take part."""
    for code, applies in (
        ("memory", _memory_advice),
        ("clock", _clock_advice),
        ("upload", _upload_advice),
        ("reachability", _reach_advice),
        ("compute", _compute_advice),
    ):
        if advice := applies(found):
            return code, advice
    return "nothing", "Nothing: it is fit as it is."


def _memory_advice(found: Findings) -> str:
    compute = found.compute
    if memory_fit(found) == "yes":
        return ""
    return f"More free memory: only a micro-batch of {compute.micro_batch} fits; close other programs."


def _clock_advice(found: Findings) -> str:
    if not _surely_off(found, WORST_CLOCK_S / 2):
        return ""
    return f"Set the clock: it is {abs(found.outside.clock_skew_s or 0.0):,.0f} s off; 60 s keep a peer out."


def _upload_advice(found: Findings) -> str:
    seconds, traffic = upload_seconds(found), found.traffic
    if seconds is None or seconds <= traffic.round_s / 2:
        return ""
    limit = "raise --upload" if found.outside.upload_limited else 'a run with strategy "sparse_loco" needs less'
    return (
        f"A faster line up: a round's {traffic.round_up_bytes / 1e6:,.1f} MB take {seconds:,.1f} s of its "
        f"{traffic.round_s:,.1f} s; {limit}."
    )


def _reach_advice(found: Findings) -> str:
    outside = found.outside
    if outside.how not in ("relay", "outgoing"):
        return ""
    port = outside.port or 4001
    return f"An open port: forward TCP {port} on the router to this machine, and join with --port {port}."


def _compute_advice(found: Findings) -> str:
    if found.compute.device != "cpu":
        return ""
    share = share_of_swarm(found)
    if share is None and found.compute.tokens_per_s >= SLOW_TOKENS_PER_S:
        return ""
    if share is not None and share >= SLOW_SHARE:
        return ""
    return "A GPU: this processor computes few tokens a second for this model."


def _useless(found: Findings) -> str:
    """Why the swarm would not notice the machine; "" if it would."""
    share, seconds = share_of_swarm(found), upload_seconds(found)
    if seconds is not None and seconds > found.traffic.round_s:
        return f"its line up needs {seconds:,.1f} s for a round of {found.traffic.round_s:,.1f} s, so it is late."
    if share is not None and share < LEAST_SHARE:
        return f"its {found.compute.tokens_per_s:,.0f} tokens/s are {share:.2%} of the swarm's."
    return ""


def _contribution(found: Findings) -> str:
    share = share_of_swarm(found)
    speed = f"{found.compute.tokens_per_s:,.0f} tokens/s"
    if share is None:
        return f"It can take part, with {speed}."
    return f"It can take part, and would add {speed}: {share:.0%} of the swarm with it."


def _surely_off(found: Findings, limit: float) -> bool:
    skew = found.outside.clock_skew_s
    return skew is not None and abs(skew) - found.outside.clock_error_s > limit


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.0f} MB"
