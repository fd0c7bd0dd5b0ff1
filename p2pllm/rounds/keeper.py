"""StateKeeper: the shared state of this peer, how it moves forward, and how others get it from us.

There are two ways forward, and both end in a digest that must be the one expected: apply the aggregate of a
round, or adopt a whole state from a peer. The aggregates of the last rounds are kept, so that whoever missed a
few rounds, or spent them downloading a state, replays them instead of starting over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from blake3 import blake3

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

Progress = Callable[[int, int], None]


def aggregate_digest(aggregate: np.ndarray) -> bytes:
    """BLAKE3 of the bytes of a flat float32 vector, 32 bytes."""
    many = aggregate.nbytes >= 1 << 20
    hasher = blake3(max_threads=blake3.AUTO if many else 1)
    return bytes(hasher.update(memoryview(aggregate).cast("B")).digest())


class StateKeeper:
    """Holds the state and the last aggregates; the only one who changes them."""

    def __init__(self, state: SharedState, optimizer: AdamW, transport: Transport) -> None:
        self.state = state
        self.head: plan.Head = (state.round, bytes.fromhex(state.digest()))
        self._optimizer = optimizer
        self._transport = transport
        self._applied: OrderedDict[plan.Head, tuple[np.ndarray, bytes]] = OrderedDict()  # -> aggregate, next digest
        self._proposed: tuple[bytes, np.ndarray] | None = None
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

    def propose(self, digest: bytes, aggregate: np.ndarray) -> None:
        """Hold the aggregate of the round that is being voted on, for members that lack it."""
        self._proposed = (digest, aggregate)

    async def apply(self, aggregate: np.ndarray) -> dict[str, float]:
        """Take the outer step of the round after the head.

        Returns the seconds of its parts: {"outer_step", "digest"}. Raises StateError if the aggregate does
        not fit; nothing has changed then.
        """
        clock = asyncio.get_running_loop().time
        async with self._lock:
            begin = clock()
            await asyncio.to_thread(self._optimizer.step, self.state, aggregate)
            stepped = clock()
            digest = bytes.fromhex(await asyncio.to_thread(self.state.digest))
            self._applied[self.head] = (aggregate, digest)
            self.head = (self.state.round, digest)
            self._proposed = self._copy = None
            kept = max(1, min(KEPT_ROUNDS, KEPT_BYTES // max(1, aggregate.nbytes)))
            while len(self._applied) > kept:
                self._applied.popitem(last=False)
            return {"outer_step": stepped - begin, "digest": clock() - stepped}

    async def fetch_aggregate(self, peers: list[str], digest: bytes) -> np.ndarray | None:
        """The aggregate with this digest from the first of `peers` that serves it; None if none does."""
        for peer in peers:
            got = await self._ask(peer, {"what": "proposed", "digest": digest}, self.state.params.nbytes)
            vector = None if got is None else _as_vector(got[1], self.layout.size)
            if vector is not None and aggregate_digest(vector) == digest:
                return vector
        return None

    async def follow(self, head: plan.Head, peers: list[str], progress: Progress | None = None) -> bool:
        """Move to `head`, which `peers` hold, or further along their rounds; False if none could help.

        A few rounds are replayed; for more, or after a divergence, the whole state is fetched first.
        """
        for peer in peers:
            if await self._replay(peer, head) or await self._adopt(peer, head, progress):
                return True
        return False

    async def _replay(self, peer: str, head: plan.Head) -> bool:
        """Apply the aggregates that lead from our head to `head`."""
        if not 0 < head[0] - self.head[0] <= KEPT_ROUNDS:
            return False
        while self.head[0] < head[0]:
            request = {"what": "applied", "round": self.head[0], "digest": self.head[1]}
            got = await self._ask(peer, request, self.state.params.nbytes)
            vector = None if got is None else _as_vector(got[1], self.layout.size)
            if got is None or vector is None:
                return False
            try:
                await self.apply(vector)
            except StateError as error:
                log.warning("an aggregate of %s does not fit: %s", peer[-8:], error)
                return False
            if self.head[1] != got[0].get("next"):
                log.warning("replaying round %d did not lead where %s is", self.head[0], peer[-8:])
                return False
        return self.head == head

    async def _adopt(self, peer: str, head: plan.Head, progress: Progress | None) -> bool:
        """Replace our state by the one of `peer`."""
        size = self.state.params.nbytes
        request = {"what": "state", "round": head[0], "digest": head[1]}
        got = await self._ask(peer, request, 3 * size, progress)
        if got is None or len(got[1]) != 3 * size:
            return False
        view = memoryview(got[1])
        try:
            state = SharedState.from_payload(
                self.layout, got[0].get("state", {}), [view[i * size : (i + 1) * size] for i in range(3)]
            )
        except StateError as error:
            log.warning("the state of %s was refused: %s", peer[-8:], error)
            return False
        digest = bytes.fromhex(await asyncio.to_thread(state.digest))
        if digest != got[0].get("digest") or (state.round == head[0] and digest != head[1]):
            log.warning("the state of %s does not have the digest that it announced", peer[-8:])
            return False
        async with self._lock:
            # The worker maps the parameters' memory, so they are overwritten, never replaced.
            np.copyto(self.state.params, state.params)
            powers = (state.beta1_power, state.beta2_power)
            self.state = SharedState(
                self.layout, self.state.params, state.m, state.v, round=state.round, beta_powers=powers
            )
            self.head = (state.round, digest)
            self._applied.clear()
            self._proposed = self._copy = None
        return True

    async def _ask(
        self, peer: str, request: dict[str, Any], max_bytes: int, progress: Progress | None = None
    ) -> tuple[dict[str, Any], bytearray] | None:
        try:
            return await fetch(self._transport, peer, request, max_bytes, progress)
        except NetworkError as error:
            log.info("%s", error)
            return None

    async def serve(self, request: dict[str, Any]) -> Blob | None:
        """Answer another peer's fetch: {"what": "proposed" | "applied" | "state", ...}."""
        digest = request.get("digest")
        match request.get("what"):
            case "proposed" if self._proposed and self._proposed[0] == digest:
                return Blob({}, [memoryview(self._proposed[1])])
            case "proposed":
                found = [vector for vector, _ in self._applied.values() if aggregate_digest(vector) == digest]
                return Blob({}, [memoryview(found[0])]) if found else None
            case "applied":
                head = (request.get("round"), digest)
                entry = next((kept for key, kept in self._applied.items() if key == head), None)
                return None if entry is None else Blob({"next": entry[1]}, [memoryview(entry[0])])
            case "state":
                return await self._state_blob()
        return None

    async def _state_blob(self) -> Blob:
        """A copy of the state as it is now; joiners that come in the same round share it."""
        async with self._lock:
            if self._copy is None or self._copy[0] != self.head:
                buffers = [bytes(view) for view in self.state.payload()]
                header = {"state": self.state.header(), "digest": self.head[1]}
                self._copy = (self.head, Blob(header, buffers))
            return self._copy[1]


def _as_vector(body: bytearray, size: int) -> np.ndarray | None:
    """The body as a float32 vector of `size` finite elements; None if it is not one."""
    if len(body) != 4 * size:
        return None
    vector = np.frombuffer(body, dtype="<f4")
    return vector if bool(np.isfinite(vector).all()) else None
