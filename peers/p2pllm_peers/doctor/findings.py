"""Findings: all that the doctor found out, with the unit in each name. What follows from them is in `judge`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """What is judged for. known: a run of peers that answered, and not only a run file."""

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

    device_free_bytes: -1 where the device computes in the host's memory. killed: how often the system ended it, for
    want of memory. failure: why it did not compute at all; "" if it did.
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
    """Bytes of memory. activations: measured, of one micro-batch; what is not named is the programs themselves."""

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
    """What the run would move here. measured: by peers of the run, else assumed as `sizes` says."""

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
    """Bytes on disk, of the run's files and of the tokenised text, and what is free where each would lie."""

    snapshots_bytes: int = 0
    aggregates_bytes: int = 0
    log_bytes: int = 0
    optimizer_bytes: int = 0
    text_bytes: int = 0
    home_free_bytes: int = 0
    cache_free_bytes: int = 0
    same_disk: bool = True
    text_problem: str = ""  # a sentence; "" if the text is here

    @property
    def home_bytes(self) -> int:
        """What the run's folder takes at most."""
        return self.snapshots_bytes + self.aggregates_bytes + self.log_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Outside:
    """The run as its peers tell it, and this machine as they see it. None: not checked.

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
