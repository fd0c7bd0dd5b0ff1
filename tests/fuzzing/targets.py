"""All targets, by name."""

from fuzzing import network_targets, round_targets, run_targets, sparse_target, transfer_targets, update_target
from fuzzing.promise import TARGETS

__all__ = [
    "TARGETS", "network_targets", "round_targets", "run_targets", "sparse_target", "transfer_targets", "update_target",
]  # fmt: skip
