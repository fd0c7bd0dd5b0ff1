"""Sizes: how many bytes a run takes of memory, disk and line, from its manifest, its layout and a few measurements.

Pure: nothing is measured here. P is the number of parameters, n the members of a round, a vector 4 P bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from p2pllm.manifest import RunDraft
from p2pllm.rounds.disk import KEPT_SNAPSHOTS
from p2pllm_peers.doctor.findings import Compute, DiskNeed, Memory, Traffic

DAEMON_BYTES = 180_000_000
"""Memory of a daemon and its p2pd beside the state."""

ASSUMED_PEERS = 4
"""Members of a round where no peer of the run says how many there are; each as fast as this machine."""

RECORD_BYTES_PER_MEMBER = 320
"""Of the log, where no peer says more: a claim and a vote, with their signatures."""

_VECTOR = 4
_INNER = {"adamw": 2, "muon": 1}


def memory_of(draft: RunDraft, compute: Compute, moments: int, free_bytes: int) -> Memory:
    """What the two processes of a peer need together.

    moments: vectors of the outer optimizer. In the worker: parameters, two of gradients (those of a micro-batch and
    their sum), the inner optimizer with the round's start, activations. In the daemon: a state (parameters and
    moments), a spare one, and one more while a snapshot is written; the update and an aggregate. On CUDA the worker's
    part is the device's, and `free_bytes` is that of the host all the same.
    """
    vector = _VECTOR * compute.parameters
    local = draft.round.strategy != "sync"
    inner = (_INNER[draft.optimizer.type] + 1) * vector if local else 0
    on_host = compute.device_free_bytes < 0
    known = vector + 2 * vector + inner
    measured = compute.worker_peak_bytes - compute.worker_base_bytes if on_host else compute.device_peak_bytes
    states = 3 * (1 + moments) * vector
    return Memory(
        parameters_bytes=vector,
        gradients_bytes=2 * vector,
        inner_optimizer_bytes=inner,
        activations_bytes=max(0, measured - known),
        outer_optimizer_bytes=states,
        exchange_bytes=2 * vector,
        needed_bytes=DAEMON_BYTES + states + 2 * vector + compute.worker_peak_bytes,
        free_bytes=free_bytes,
    )


def update_bytes(draft: RunDraft, parameters: int, bytes_for: Callable[[int], int], sparse_bytes: int) -> int:
    """One update as it travels. bytes_for: of the run's codec. sparse_bytes: of an encoded sparse update."""
    if draft.round.strategy == "sparse_loco":
        return sparse_bytes
    return bytes_for(-(-parameters // draft.round.fragments))


def moved_a_round(draft: RunDraft, update: int, members: int) -> int:
    """Bytes that one of n members sends in a round; it receives as many.

    Sparse updates go whole to each other member: (n - 1) times one. The all-reduce sends each other member its part
    of our vector and the reduced part that is ours: 2 (n - 1) / n times one.
    """
    if members < 2:
        return 0
    if draft.round.strategy == "sparse_loco":
        return (members - 1) * update
    return 2 * (members - 1) * update // members


def round_seconds(draft: RunDraft, own: float, swarm: float, now_s: float, sending_s: float = 0.0) -> float:
    """How long a round takes once this machine takes part.

    own, swarm: tokens a second of this machine, and of the others together. now_s: of a round without it, as measured;
    0: unknown. What a round takes beyond computing its samples stays, and computing is shared by one more. Where the
    deadline ends it, it ends there. sending_s: what a round's bytes take here on the way up; it counts where nothing
    was measured, and with overlap only as far as it takes longer than computing.
    """
    tokens = draft.round.samples * draft.data.context_length
    if own + swarm <= 0:
        return now_s or draft.round.deadline_s
    computing = min(tokens / (own + swarm), draft.round.deadline_s)
    if not now_s or swarm <= 0:
        return max(computing, sending_s) if draft.round.overlap else computing + sending_s
    return now_s - min(tokens / swarm, now_s, draft.round.deadline_s) + computing


def traffic_of(
    draft: RunDraft, update: int, members: int, round_s: float, control: tuple[float, float], *, measured: bool
) -> Traffic:
    """MB an hour each way: 3600 / round_s rounds of `moved_a_round`, and control messages as a peer measured them.

    control: bytes a second (sent, received). Not in it: the state that a joiner fetches once, and what this machine
    gives to later joiners.
    """
    moved = moved_a_round(draft, update, members)
    rounds_per_hour = 3600 / max(round_s, 1e-3)
    up, down = (moved * rounds_per_hour + 3600 * each for each in control)
    return Traffic(
        members=members,
        round_s=round_s,
        round_up_bytes=moved,
        round_down_bytes=moved,
        control_up_bytes_per_s=control[0],
        control_down_bytes_per_s=control[1],
        up_mb_per_hour=up / 1e6,
        down_mb_per_hour=down / 1e6,
        measured=measured,
    )


def disk_of(
    draft: RunDraft,
    parameters: int,
    moments: int,
    update: int,
    members: int,
    budget: int,
    text_bytes: int,
    record_bytes: float,
) -> DiskNeed:
    """What a peer keeps at most, without what is free.

    The kept snapshots and the one that is being written; the aggregates since the older of them, up to the budget,
    after which an early snapshot makes room; the log of all rounds; the inner optimizer's moments, or the error
    feedback. An aggregate is a vector (of a fragment), or the updates of all members.
    """
    vector = _VECTOR * parameters
    section = draft.round
    sparse = section.strategy == "sparse_loco"
    aggregate = members * update if sparse else -(-vector // section.fragments)
    kept = min(KEPT_SNAPSHOTS * section.snapshot_every, section.rounds) * aggregate
    own = 0 if section.strategy == "sync" else _INNER[draft.optimizer.type] * vector + sparse * vector
    return DiskNeed(
        snapshots_bytes=(KEPT_SNAPSHOTS + 1) * (1 + moments) * vector,
        aggregates_bytes=min(kept, budget),
        log_bytes=int(section.rounds * (record_bytes or RECORD_BYTES_PER_MEMBER * members)),
        optimizer_bytes=own,
        text_bytes=text_bytes,
    )
