"""What a peer keeps and shows of a round that it committed. What does not live here: who reads it (`metrics`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from p2pllm.manifest import RunManifest
from p2pllm.metrics import RoundRecord
from p2pllm.rounds.record import Record
from p2pllm.rounds.round import RoundResult
from p2pllm.state.adamw import learning_rate


def round_record(
    manifest: RunManifest,
    record: Record,
    result: RoundResult,
    *,
    validation_loss: float | None,
    own_steps: Sequence[int],
    seconds: Mapping[str, float],
    round_s: float,
) -> RoundRecord:
    """own_steps: samples of each of our steps. seconds: by part of the round. round_s: of all of it, wall time."""
    body = record.body
    return RoundRecord(
        round=body.round,
        unix_time=time.time(),
        samples=body.samples,
        tokens=body.samples * manifest.data.context_length,
        members={claim.peer: claim.samples for claim in body.members},
        loss=body.loss,
        validation_loss=validation_loss,
        learning_rate=learning_rate(manifest.optimizer, manifest.round.rounds, body.round - 1),
        record_digest=body.digest.hex(),
        aggregate_digest=body.aggregate.hex(),
        state_digest=body.state.hex(),
        attempts=result.attempts,
        failures=result.failures,
        own_steps=list(own_steps),
        bytes_sent=result.bytes_sent,
        bytes_received=result.bytes_received,
        seconds={name: round(value, 6) for name, value in seconds.items()},
        round_s=round(round_s, 6),
    )
