"""StateKeeper: the shared state of this peer, how it moves forward, and how others get it from us.

There are two ways forward, and both end in a digest that must be the one expected: apply the aggregate of a
round, or adopt a whole state from a peer. The aggregates of the last rounds are kept, so that whoever missed a
few rounds, or spent them downloading a state, replays them instead of starting over.

Memory, with a state of S bytes (12 a parameter): S for the state, S for the copy that joiners are served (at most
one older copy a fetch that is under way, see `bulk.MAX_CONCURRENT`), 2S while a whole state is fetched (its bytes and
the vectors made of them), and the aggregates.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from p2pllm.errors import NetworkError, StateError
from p2pllm.network.bulk import Blob, fetch
from p2pllm.network.transport import Transport
from p2pllm.rounds import plan
from p2pllm.state.layout import Layout
from p2pllm.state.outer import AdamW
from p2pllm.state.shared import SharedState

log = logging.getLogger(__name__)

KEPT_ROUNDS = 64
KEPT_BYTES = 256 << 20
"""Aggregates are kept for replay up to this many rounds and bytes, but always the last one."""

Vector = NDArray[np.float32]

T = TypeVar("T")


@dataclass(frozen=True)
class _Step:
    """One round as it was applied: what a peer that is one round behind needs, and where it leads."""

    aggregate: Vector
    aggregate_digest: bytes
    next: bytes  # digest of the state after it


def aggregate_digest(aggregate: Vector) -> bytes:
    """BLAKE3 of the bytes of a flat float32 vector, 32 bytes."""
    many = aggregate.nbytes >= 1 << 20
    hasher = blake3(max_threads=blake3.AUTO if many else 1)
    return bytes(hasher.update(aggregate.data.cast("B")).digest())


class StateKeeper:
    """Holds the state and the last aggregates; the only one who changes them."""

    def __init__(self, state: SharedState, optimizer: AdamW, transport: Transport) -> None:
        self.state = state
        self.head: plan.Head = (state.round, bytes.fromhex(state.digest()))
        self.refuted: set[str] = set()
        """Peers that `follow` last found to hold something else than they claim; not those that only failed."""
        self._optimizer = optimizer
        self._transport = transport
        self._applied: OrderedDict[plan.Head, _Step] = OrderedDict()
        self._proposed: tuple[bytes, Vector] | None = None
        self._copy: tuple[plan.Head, Blob] | None = None
        self._lock = asyncio.Lock()

    @property
    def layout(self) -> Layout:
        """Layout of every flat vector here."""
        return self.state.layout

    @asynccontextmanager
    async def held(self) -> AsyncIterator[SharedState]:
        """The state, kept as it is until the block ends."""
        async with self._lock:
            yield self.state

    def propose(self, digest: bytes, aggregate: Vector) -> None:
        """Hold the aggregate of the round that is being voted on, for members that lack it."""
        self._proposed = (digest, aggregate)

    async def apply(self, aggregate: Vector) -> dict[str, float]:
        """Take the outer step of the round after the head.

        Returns the seconds of its parts: {"outer_step", "digest"}. Raises StateError if the aggregate does
        not fit; nothing has changed then. If cancelled, it ends first: half a step would be no state at all.
        """
        return await _to_the_end(self._apply(aggregate))

    async def _apply(self, aggregate: Vector) -> dict[str, float]:
        clock = asyncio.get_running_loop().time
        begin = clock()  # a state that is being saved is waited for, too
        async with self._lock:
            proposed = self._proposed if self._proposed and self._proposed[1] is aggregate else None
            digest = proposed[0] if proposed else await asyncio.to_thread(aggregate_digest, aggregate)
            await asyncio.to_thread(self._optimizer.step, self.state, aggregate)
            stepped = clock()
            after = bytes.fromhex(await asyncio.to_thread(self.state.digest))
            self._keep(self.head, _Step(aggregate, digest, after))
            self.head = (self.state.round, after)
            self._proposed = self._copy = None
            return {"outer_step": stepped - begin, "digest": clock() - stepped}

    def _keep(self, before: plan.Head, step: _Step) -> None:
        self._applied[before] = step
        kept = max(1, min(KEPT_ROUNDS, KEPT_BYTES // max(1, step.aggregate.nbytes)))
        while len(self._applied) > kept:
            self._applied.popitem(last=False)

    # -- catching up -----------------------------------------------------------------------------------------------

    async def fetch_aggregate(self, peers: list[str], digest: bytes) -> Vector | None:
        """The aggregate with this digest from the first of `peers` that serves it; None if none does."""
        for peer in peers:
            got = await self._ask(peer, {"what": "proposed", "digest": digest}, self.state.params.nbytes)
            vector = None if got is None else _as_vector(got[1], self.layout.size)
            if vector is not None and await asyncio.to_thread(aggregate_digest, vector) == digest:
                return vector
        return None

    async def follow(self, head: plan.Head, peers: list[str]) -> bool:
        """Move to `head`, which `peers` claim to hold, or further along their rounds; False if none could help.

        A few rounds are replayed; for more, or after a divergence, the whole state is fetched. Our state changes
        only when another one is whole and has the digest that was claimed.
        """
        self.refuted.clear()
        for peer in peers:
            if await self._replay(peer, head) or await self._adopt(peer, head):
                return True
        return False

    async def _replay(self, peer: str, head: plan.Head) -> bool:
        """Apply the aggregates that lead from our head to `head`, on a copy that is taken if it arrives there."""
        if not 0 < head[0] - self.head[0] <= KEPT_ROUNDS:
            return False
        trial: SharedState | None = None
        at, steps = self.head, list[tuple[plan.Head, _Step]]()
        while at[0] < head[0]:
            got = await self._ask(peer, {"what": "applied", "round": at[0], "digest": at[1]}, self.state.params.nbytes)
            vector = None if got is None else _as_vector(got[1], self.layout.size)
            if got is None or vector is None:
                return False
            if trial is None:
                trial = await asyncio.to_thread(_copy_of, self.state)
            try:
                digest, after = await _to_the_end(asyncio.to_thread(self._try_step, trial, vector))
            except StateError as error:
                log.warning("an aggregate of %s does not fit: %s", peer[-8:], error)
                return False
            steps.append((at, _Step(vector, digest, after)))
            at = (trial.round, after)
            if after != got[0].get("next"):
                log.warning("replaying round %d did not lead where %s is", at[0], peer[-8:])
                return False
        if trial is None or at != head:
            return False
        await self._take(trial, at)
        for before, step in steps:
            self._keep(before, step)
        return True

    def _try_step(self, state: SharedState, aggregate: Vector) -> tuple[bytes, bytes]:
        """One step; returns the digests of the aggregate and of the state after it."""
        self._optimizer.step(state, aggregate)
        return aggregate_digest(aggregate), bytes.fromhex(state.digest())

    async def _adopt(self, peer: str, head: plan.Head) -> bool:
        """Replace our state by the one of `peer`."""
        size = self.state.params.nbytes
        request = {"what": "state", "round": head[0], "digest": head[1]}
        try:
            got = await fetch(self._transport, peer, request, 3 * size)
        except NetworkError as error:
            log.info("%s", error)
            return False
        try:
            if got is None:
                raise StateError("It has none.")
            state = await asyncio.to_thread(_state_of, self.layout, got[0], got[1])
        except StateError as error:
            log.warning("the state of %s was refused: %s", peer[-8:], error)
            self.refuted.add(peer)
            return False
        at = (state.round, bytes.fromhex(await asyncio.to_thread(state.digest)))
        if at[1] != got[0].get("digest") or at[0] < head[0] or (at[0] == head[0] and at != head):
            log.warning("the state of %s is not the one that it announced", peer[-8:])
            self.refuted.add(peer)
            return False
        await self._take(state, at)
        self._applied.clear()
        return True

    async def _take(self, state: SharedState, head: plan.Head) -> None:
        async with self._lock:
            # The worker maps the parameters' memory, so they are overwritten, never replaced.
            np.copyto(self.state.params, state.params)
            powers = (state.beta1_power, state.beta2_power)
            self.state = SharedState(
                self.layout, self.state.params, state.m, state.v, round=state.round, beta_powers=powers
            )
            self.head = head
            self._proposed = self._copy = None

    async def _ask(self, peer: str, request: dict[str, Any], max_bytes: int) -> tuple[dict[str, Any], bytearray] | None:
        try:
            return await fetch(self._transport, peer, request, max_bytes)
        except NetworkError as error:
            log.info("%s", error)
            return None

    # -- serving ---------------------------------------------------------------------------------------------------

    async def serve(self, request: dict[str, Any]) -> Blob | None:
        """Answer another peer's fetch: {"what": "proposed" | "applied" | "state", ...}."""
        digest = request.get("digest")
        match request.get("what"):
            case "proposed" if self._proposed and self._proposed[0] == digest:
                return Blob({}, [self._proposed[1].data])
            case "proposed":
                found = next((step for step in self._applied.values() if step.aggregate_digest == digest), None)
                return None if found is None else Blob({}, [found.aggregate.data])
            case "applied":
                head = (request.get("round"), digest)
                step = next((kept for key, kept in self._applied.items() if key == head), None)
                return None if step is None else Blob({"next": step.next}, [step.aggregate.data])
            case "state":
                return await self._state_blob()
        return None

    async def _state_blob(self) -> Blob:
        """A copy of the state as it is now; joiners that come in the same round share it."""
        async with self._lock:
            if self._copy is None or self._copy[0] != self.head:
                buffers = await _to_the_end(asyncio.to_thread(lambda: [bytes(view) for view in self.state.payload()]))
                header = {"state": self.state.header(), "digest": self.head[1]}
                self._copy = (self.head, Blob(header, buffers))
            return self._copy[1]


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if we are cancelled meanwhile, only when it is over: a thread goes on whoever waits for it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _copy_of(state: SharedState) -> SharedState:
    powers = (state.beta1_power, state.beta2_power)
    vectors = (state.params.copy(), state.m.copy(), state.v.copy())
    return SharedState(state.layout, *vectors, round=state.round, beta_powers=powers)


def _state_of(layout: Layout, header: dict[str, Any], body: bytearray) -> SharedState:
    """The state in a fetched blob. Raises StateError if it is none."""
    view, third = memoryview(body), 4 * layout.size
    if len(view) != 3 * third:
        raise StateError(f"It has {len(view)} bytes instead of {3 * third}.")
    return SharedState.from_payload(
        layout, header.get("state", {}), [view[i * third : (i + 1) * third] for i in range(3)]
    )


def _as_vector(body: bytearray, size: int) -> Vector | None:
    """The body as a float32 vector of `size` finite elements; None if it is not one."""
    if len(body) != 4 * size:
        return None
    vector: Vector = np.frombuffer(body, dtype="<f4")
    return vector if bool(np.isfinite(vector).all()) else None
