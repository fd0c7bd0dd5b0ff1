"""Stand-ins for what is slow or needs hardware: a compute process without a model, and small states and runs.

What does not live here: the network (`network`) and peers, which are real (`swarm`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from p2pllm.manifest import RunDraft, RunManifest
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.keeper import StateKeeper
from p2pllm.rounds.messages import Status
from p2pllm.rounds.record import Head
from p2pllm.rounds.update import Update
from p2pllm.state import Layout, SharedState, moments_of, span_of
from p2pllm.testing.network import peer_number

LAYOUT = Layout.of([("matrix", (20, 30)), ("vector", (37,))])
"""Of the model that a peer in memory "trains" unless it is told otherwise: 637 parameters."""

FAKE_LOSS = 1.0
FAKE_VALIDATION_LOSS = 2.0


class FakeCompute:
    """A compute process without a model: its gradient depends on parameters, peer and round alone.

    batch: samples that it gathers every `step_s` seconds; both may be changed at any time. fruitless: how many of
    the next rounds it has no update for. finished, abandoned: rounds that ended so. landed: rounds that it had begun
    before their state was there. base: the shared parameters that its work stands on, as it last took them.
    """

    def __init__(self, number: int, keeper: StateKeeper, notify: Callable[[], None], fragments: int = 1) -> None:
        """number: of the peer. notify: called after every micro-batch, as the daemon does. fragments: of the run."""
        self.number, self.keeper, self.notify = number, keeper, notify
        self.ready = True
        self.samples = 0
        self.own_steps: list[int] = []
        self.batch, self.step_s = 4, 0.1
        self.fruitless = 0
        self.finished = 0
        self.abandoned = 0
        self.landed: list[int] = []
        self.base = keeper.state.params.copy()
        self.parked = False
        self._held = False
        self._gradient = np.zeros(keeper.layout.size, np.float32)
        self._fragments, self._round = fragments, 0
        self._work: asyncio.Task[None] | None = None
        self._goes_on = False

    async def begin(self, round_number: int) -> None:
        """See Compute: what it did since it went on stays, on top of the state that is there now."""
        if self._goes_on:
            self._round = round_number  # with fragments, this is the one that it hands over
            self.landed.append(round_number)
        else:
            self._start(round_number)
        self._goes_on = False
        np.copyto(self.base, self.keeper.state.params)

    def _start(self, round_number: int) -> None:
        self.end()
        self.samples, self._round, self.parked = 0, round_number, False
        noise = np.random.default_rng([self.number, round_number]).standard_normal(self._gradient.size)
        self._gradient = (self.keeper.state.params * np.float32(0.1) + noise.astype(np.float32)).astype(np.float32)
        self._work = asyncio.create_task(self._gather())

    async def _gather(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if not self._held:
                self.samples += self.batch
                self.notify()

    def end(self) -> None:
        """Gather no more."""
        self._goes_on = False
        if self._work is not None:
            self._work.cancel()

    async def finish(self, go_on: bool = False) -> Update | None:
        """See Compute."""
        self.end()
        self.finished += 1
        if self.fruitless or not self.samples:
            self.fruitless = max(0, self.fruitless - 1)
            return None
        self.own_steps = [self.batch] * (self.samples // self.batch)
        span = span_of(self._gradient.size, self._fragments, self._round)
        update = Update(self.samples, FAKE_LOSS, self._gradient[slice(*span)])
        if go_on:
            self._start(self.keeper.head[0] + 1)
            self._goes_on = True
        return update

    async def abandon(self) -> None:
        """See Compute."""
        self.end()
        self.abandoned += 1

    async def hold(self, held: bool) -> None:
        """See Compute."""
        self._held = held

    async def park(self) -> None:
        """See Compute."""
        self.end()
        self.parked = True

    async def evaluate(self) -> float | None:
        """See Compute."""
        return FAKE_VALIDATION_LOSS


def make_state(round_: int = 0, seed: int = 0, layout: Layout = LAYOUT) -> SharedState:
    """A state of small random parameters; with `round_`, as if so many steps had been made."""
    params = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    state = SharedState.initial(layout, params)
    if round_:
        state.round = round_
    return state


def make_manifest(layout: Layout = LAYOUT, **section: Any) -> RunManifest:
    """A run of 5 small rounds that starts at `make_state()`; `section` changes fields of its [round]."""
    values = {"rounds": 5, "samples": 12, "deadline_s": 5.0, "roster_wait_s": 2.0, **section}
    draft = RunDraft.model_validate({"round": values, "data": {"validation_every": 3}})
    initial = make_state(layout=layout.with_moments(moments_of(draft))).digest()
    return draft.seal(founder=peer_number(0), initial_state=initial, tokenizer="bytes", data_digest="")


def status(
    round_: int, digest: bytes | int = 0, phase: str = "collecting", samples: int = 0, *, total: int | None = None
) -> Status:
    """A status in few words; a number stands for a digest, and a round has 12 samples."""
    where = branch(round_, digest, total=total)
    return Status.model_validate(
        {
            "round": round_,
            "digest": where.head[1],
            "total": where.total,
            "anchor": 0,
            "phase": phase,
            "samples": samples,
            "tokens_per_s": 0.0,
        }
    )


def head(round_: int, digest: int = 0) -> Head:
    """A head in few words; a number stands for a digest."""
    return (round_, bytes([digest]) * 32)


def branch(round_: int, digest: bytes | int = 0, *, total: int | None = None, anchor: int = 0) -> Branch:
    """A branch in few words; a number stands for a digest, and a round has 12 samples."""
    whole = bytes([digest]) * 32 if isinstance(digest, int) else digest
    return Branch((round_, whole), 12 * round_ if total is None else total, anchor)
