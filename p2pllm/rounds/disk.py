"""Disk: what one peer keeps of a run: its log, the aggregates to replay, and snapshots of the state.

    <folder>/log            the records, see `log`
    <folder>/aggregates/    by digest: those of the rounds since the older of the kept snapshots
    <folder>/state/         snapshots, see `state.snapshot`

The newest state is the newest snapshot with the aggregates after it applied. What does not live here: the state that
a peer works on (`keeper`) and getting what is missing from others (`catchup`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2pllm.averaging import Form, Term, form_of
from p2pllm.errors import ArithmeticsError, StateError
from p2pllm.manifest import RunManifest
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.record import Body, Claim, Head
from p2pllm.state import BlobStore, Layout, OuterOptimizer, SharedState, Snapshot, SnapshotStore
from p2pllm.state.chunks import BytesLike

log = logging.getLogger(__name__)

KEPT_SNAPSHOTS = 2
"""The newest ones of our branch. From the older one we can go back a little, when another branch wins."""

BUDGET_BYTES = 10 << 30
"""Disk for aggregates, unless the settings say otherwise; the log and the kept snapshots come on top."""

OTHER_STEP = (
    "Replaying round {round} gives another state here than the swarm's: this machine computes the outer step "
    "differently, or its memory is damaged; run it on another machine."
)

Vector = NDArray[np.float32]


class Disk:
    """The files of one peer. Without a folder all is kept in memory, for peers that are simulated.

    `log`, `aggregates` and `snapshots` may be used directly.
    """

    def __init__(
        self,
        folder: Path | None,
        manifest: RunManifest,
        layout: Layout | None,
        *,
        budget: int = BUDGET_BYTES,
        read_only: bool = False,
    ) -> None:
        """budget: bytes of aggregates. read_only: beside the peer that these files belong to. Raises StateError."""
        self.run_id = manifest.run_id
        self.initial_state = bytes.fromhex(manifest.initial_state)
        self.log = RoundLog(_in(folder, "log"), self.run_id, manifest.founder, read_only)
        self.aggregates = BlobStore(_in(folder, "aggregates"), read_only=read_only)
        self.snapshots = SnapshotStore(_in(folder, "state"), self.run_id, layout, read_only=read_only)
        self._manifest = manifest
        self._form: tuple[Layout, Form] | None = None
        self._every = manifest.round.snapshot_every
        self.budget = budget

    def is_snapshot_round(self, round_: int) -> bool:
        """Whether every peer saves the state of this round, so that joiners can have it from several at once."""
        return round_ % self._every == 0 or round_ == 1

    @property
    def room(self) -> int:
        """Bytes of aggregates that may still come; below 0 if there are more than there may be."""
        return self.budget - sum(self.aggregates.sizes())

    @property
    def is_full(self) -> bool:
        """Another aggregate would be more than there may be; a snapshot now would make most of them needless."""
        sizes = self.aggregates.sizes()
        return sum(sizes) + max(sizes, default=0) > self.budget

    def on_branch(self) -> list[Snapshot]:
        """The snapshots of our branch, newest first."""
        return [found for found in self.snapshots.all() if self.log.digest(found.round) == found.record]

    def form(self, layout: Layout) -> Form:
        """How the run's aggregates are read."""
        if self._form is None or self._form[0] != layout:
            self._form = (layout, form_of(self._manifest, layout))
        return self._form[1]

    def update_of(self, body: Body, layout: Layout) -> Vector | None:
        """The mean update of a round, as of `read`; None if its aggregate is not here or of no use."""
        found = self.aggregates.get(body.aggregate)
        try:
            return None if found is None else self.read(found, body.members, layout, body.round - 1)
        except ValueError as error:
            log.error("the aggregate of round %d is of no use: %s", body.round, error)
            return None

    def read(self, aggregate: BytesLike, claims: Sequence[Claim], layout: Layout, base: int) -> Vector:
        """The mean update that an aggregate of these claims' updates holds, as `Form.vector` gives it.

        base: round of the state that it is a step from. Raises ValueError if it does not fit.
        """
        return self.form(layout).vector(aggregate, [Term(claim.samples, claim.update) for claim in claims], base)

    # -- coming back -------------------------------------------------------------------------------------------------

    def newest_base(self) -> SharedState | None:
        """The newest snapshot of our branch that is undamaged; None if there is none."""
        for found in self.on_branch():
            try:
                return self.snapshots.load(found)
            except StateError as error:
                log.warning("skipped the snapshot of round %d: %s", found.round, error)
        return None

    def replay(self, state: SharedState, optimizer: OuterOptimizer, last: int) -> None:
        """Take `state`, in place, along our log up to round `last`, or to where something is missing here.

        Raises StateError if an aggregate does not lead where the record says; `state` is of no use then.
        """
        while state.round < last:
            record = self.log.record(state.round + 1)
            vector = None if record is None else self.update_of(record.body, state.layout)
            if record is None or vector is None:
                return
            optimizer.step(state, vector)
            if bytes.fromhex(state.digest()) != record.body.state:
                raise ArithmeticsError(OTHER_STEP.format(round=state.round))

    def recover(self, optimizer: OuterOptimizer, initial: SharedState | None) -> SharedState | None:
        """The newest state that these files lead to, in new memory; None if there is none and no `initial`.

        initial: the state at round 0; it is not changed.
        """
        state = self.newest_base()
        if state is None and initial is not None:
            state = copy_of(initial)
        if state is not None:
            self.replay(state, optimizer, self.log.branch.head[0])
        return state

    def head_at(self, round_: int) -> Head:
        """The place of a round on our branch. Raises StateError if we do not know it."""
        digest = self.log.digest(round_)
        if digest is None:
            raise StateError(f"The log does not name the record of round {round_}.")
        return (round_, digest)

    # -- staying within bounds ---------------------------------------------------------------------------------------

    def save(self, state: SharedState, record: bytes, old: Collection[bytes]) -> None:
        """Keep a snapshot, and drop what is not needed any more, see `collect`.

        Raises StateError if the disk does not take it.
        """
        self.snapshots.save(state, record)
        self.collect(old)

    def collect(self, old: Collection[bytes]) -> None:
        """Drop snapshots and aggregates that no replay needs: the older ones, and those of abandoned branches.

        old: digests of aggregates that may go. Others may have come since, to be voted on: no record names them yet.
        """
        kept = self.on_branch()[: 1 if self.is_full else KEPT_SNAPSHOTS]
        for found in self.snapshots.all():
            if found not in kept:
                self.snapshots.drop(found)
        first = kept[-1].round + 1 if kept else 1
        last = self.log.branch.head[0]
        needed = {record.body.aggregate for round_ in range(first, last + 1) if (record := self.log.record(round_))}
        for digest in old:
            if digest not in needed:
                self.aggregates.drop(digest)

    def close(self) -> None:
        """Close the log."""
        self.log.close()


def copy_of(state: SharedState) -> SharedState:
    """The same state in memory of its own."""
    return SharedState(state.layout, [vector.copy() for vector in state.vectors], round=state.round)


def _in(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name
