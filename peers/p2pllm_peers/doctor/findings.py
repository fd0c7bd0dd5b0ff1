"""Findings: all that the doctor found out, with the unit in each name. What follows from them is in `judge`.

`p2pllm doctor --json` prints one object: the verdict, and beside it every class below under its name in `Findings`.

    can_take_part       what the exit code says, too: 0 it can, 1 it cannot
    would_help          it can, and the swarm would notice
    reason, advice      sentences: why, and what to do about what would help most
    helps_most          memory, text, arithmetic, disk, clock, upload, reachability, compute or nothing
    memory_fit          "yes", "with micro-batch N" or "no"
    swarm_share         of the swarm's tokens a second with this machine, 0 to 1; null if no swarm is known
    upload_s_per_round  seconds that a round's bytes take on the way up; null if the line was not measured
    disk_needed_bytes   what run and text take on disk at most, with what is here already
    disk_missing_bytes  what is missing for that on the fuller disk; 0 if all fits
    run, compute, memory, traffic, disk, outside, versions, arithmetic_problem
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """What is judged for. known: a run of peers that answered, and not only a run file.

    strategy, samples_per_round, tokens_per_sample, overlap: of the manifest. run_id: "" for a run file.
    """

    name: str = ""
    run_id: str = ""
    known: bool = False
    strategy: str = "sync"
    samples_per_round: int = 32
    tokens_per_sample: int = 128
    overlap: bool = False


@dataclass(frozen=True)
class Compute:
    """What the worker did in a few seconds.

    micro_batch: samples computed at once; micro_batch_reduced: fewer than suit the device, for want of memory. killed:
    how often the system ended it, for the same. measured_s: over which tokens_per_s was measured. parameters: numbers
    of the model. worker_base_bytes, worker_peak_bytes: of the host's memory, before the model and at most.
    device_free_bytes: -1 where the device computes in the host's memory. failure: a sentence, why it did not compute
    at all; "" if it did.
    """

    device: str = ""
    micro_batch: int = 0
    micro_batch_reduced: bool = False
    killed: int = 0
    tokens_per_s: float = 0.0
    measured_s: float = 0.0
    parameters: int = 0
    worker_base_bytes: int = 0
    worker_peak_bytes: int = 0
    device_peak_bytes: int = 0
    device_free_bytes: int = -1
    failure: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes of memory. activations: measured, of one micro-batch; what is not named is the programs themselves.

    needed: by the peer at most, all in all. free: what programs can still have, by the machine and its containers.
    """

    parameters_bytes: int = 0
    gradients_bytes: int = 0
    inner_optimizer_bytes: int = 0
    activations_bytes: int = 0
    outer_optimizer_bytes: int = 0
    exchange_bytes: int = 0
    needed_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True)
class Traffic:
    """What the run would move here. measured: by peers of the run, else assumed as `sizes` says.

    members: of a round, this machine included. round_s: how long one takes. round_up_bytes, round_down_bytes: of its
    updates. control: what heartbeats and votes take beside them. MB are 10**6 bytes.
    """

    members: int = 0
    round_s: float = 0.0
    round_up_bytes: int = 0
    round_down_bytes: int = 0
    control_up_bytes_per_s: float = 0.0
    control_down_bytes_per_s: float = 0.0
    up_mb_per_hour: float = 0.0
    down_mb_per_hour: float = 0.0
    measured: bool = False


@dataclass(frozen=True)
class DiskNeed:
    """Bytes on disk, of the run's files and of the tokenised text, and what is free where each would lie.

    home_here_bytes, text_here_bytes: what is here of them already, from taking part before. same_disk: home and
    cache lie on one. text_problem: a sentence; "" if the text is here.
    """

    snapshots_bytes: int = 0
    aggregates_bytes: int = 0
    log_bytes: int = 0
    optimizer_bytes: int = 0
    text_bytes: int = 0
    home_here_bytes: int = 0
    text_here_bytes: int = 0
    home_free_bytes: int = 0
    cache_free_bytes: int = 0
    same_disk: bool = True
    text_problem: str = ""

    @property
    def home_bytes(self) -> int:
        """What the run's folder takes at most."""
        return self.snapshots_bytes + self.aggregates_bytes + self.log_bytes + self.optimizer_bytes

    @property
    def home_grows_bytes(self) -> int:
        """How much of that is not here yet."""
        return max(0, self.home_bytes - self.home_here_bytes)

    @property
    def text_grows_bytes(self) -> int:
        """The same of the tokenised text."""
        return max(0, self.text_bytes - self.text_here_bytes)


@dataclass(frozen=True)
class Outside:
    """The run as its peers tell it, and this machine as they see it. None: not checked.

    asked: how many were. peers, round, rounds: of the run now. clock_skew_s: our clock minus theirs, give or take
    clock_error_s. upload_mbit: Mbit/s; upload_limited: as our own setting says, and not measured. why_not: a phrase,
    why something was not checked.
    how: "direct" (a peer dialled us back), "relay" (others come through one), "outgoing" (we dial, nobody dials us).
    scope: where the peer is that saw us, "internet", "local network" or "this machine"; "" if none sees an address of
    ours, as through a relay.
    """

    asked: int = 0
    peers: int = 0
    round: int = 0
    rounds: int = 0
    swarm_tokens_per_s: float = 0.0
    clock_skew_s: float | None = None
    clock_error_s: float = 0.0
    how: str | None = None
    scope: str = ""
    seen_as: str = ""
    port: int = 0
    upload_mbit: float | None = None
    upload_limited: bool = False  # by our own setting
    why_not: str = ""


@dataclass(frozen=True)
class Findings:
    """Everything. versions: by program. arithmetic: "" if the outer step is that of others, else a sentence."""

    run: Run = Run()
    compute: Compute = Compute()
    memory: Memory = Memory()
    traffic: Traffic = Traffic()
    disk: DiskNeed = DiskNeed()
    outside: Outside = Outside()
    versions: dict[str, str] = field(default_factory=dict)
    arithmetic_problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
