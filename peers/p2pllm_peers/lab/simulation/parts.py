"""A simulated peer and what it is made of beside the real protocol: compute that waits, the directory in memory, and
paths with delays.

What does not live here: the exchange (`exchange`), running a swarm of peers (`simulator`) and what was
measured (`ledger`).
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVarTuple

import numpy as np

from p2pllm.errors import NetworkError
from p2pllm.metrics import RoundRecord
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.messages import Status
from p2pllm.rounds.update import Update
from p2pllm.state import Layout
from p2pllm.testing.clock import TICK_S, VirtualLoop
from p2pllm.testing.host import Call, MemoryHost
from p2pllm.testing.network import MemoryNetwork
from p2pllm.testing.swarm import MemoryPeer

if TYPE_CHECKING:
    from p2pllm_peers.lab.simulation.simulator import Simulation

LAYOUT = Layout.of([("weights", (4,))])
"""Of the model that nobody trains: 4 floats, so that a round costs its messages and nothing else."""

COMPUTE_S = 10.0
"""Virtual seconds of compute a round."""

STEP_S = 5.0
"""Virtual seconds of one micro-batch; a peer says how many samples it has after each."""

SPEEDS = (0.9, 1.1)
"""Peers differ: a micro-batch takes between these times STEP_S."""

MAX_RECORDS, RECORD_S, ANNOUNCE_S = 1024, 60.0, 20.0
"""Of the directory in the DHT, as in `p2pllm.network.dht`, which is not imported because that takes seconds."""

LOOK_UP_HOPS = 6
"""Messages one after the other in a lookup: three steps of Kademlia there and back, as with thousands of nodes."""

GRID_S = 0.001
"""Virtual times are rounded up to multiples of this."""

Ts = TypeVarTuple("Ts")

_ROUNDING = 1e-6
_MASK = (1 << 64) - 1


class CoarseLoop(VirtualLoop):
    """Virtual time in steps of GRID_S: what thousands of peers do in one of them is done in one turn of the loop."""

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio: no earlier than `when`, and what is for later never now."""
        due = math.ceil(when / GRID_S - _ROUNDING) * GRID_S
        if when > (now := self.time()) and due <= now + TICK_S:
            due += GRID_S  # who waits for the rest of a nanosecond again and again would stop the clock
        return super().call_at(due, callback, *args, context=context)


class QuickHost(MemoryHost):
    """A host that answers at once where the handler does not wait, without a task for each call."""

    __slots__ = ()

    def take(self, call: Call) -> None:
        """See MemoryHost."""
        handler = None if call.is_stream else self.calls.get(call.method)
        if handler is None:
            return super().take(call)
        self.got(call.method, len(call.payload), 1)
        try:
            self.context.run(handler(call.caller.peer_id, call.payload).send, None)  # type: ignore[attr-defined]
        except StopIteration as answer:
            call.answer = answer.value
        except Exception as error:  # noqa: BLE001 - whatever it is, its caller gets it as over a real network
            call.error = NetworkError(f"Peer {self.peer_id[-8:]}: {error}.")
        else:
            raise RuntimeError(f"The handler of {call.method} waits; serve it by a task.")
        return self.network.reply(call)


class PathNetwork(MemoryNetwork):
    """Every path has a delay of its own, drawn once: the order of what is sent changes nothing."""

    host_class = QuickHost

    def __init__(self, low_s: float, high_s: float, seed: int) -> None:
        """low_s, high_s: seconds one way."""
        super().__init__(latency_s=low_s, seed=seed)
        self.mean_s = (low_s + high_s) / 2
        self._low, self._range = low_s, (high_s - low_s) / (1 << 32)
        self._seed = random.Random(seed).getrandbits(64)  # noqa: S311 - the same in every run

    def delay(self, sender: MemoryHost, receiver: MemoryHost) -> float:
        """See MemoryNetwork."""
        # splitmix64, a good hash in few operations: this is asked for with every message
        mixed = ((sender.number << 32 | receiver.number) + self._seed) & _MASK
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        return self._low + self._range * (mixed >> 32) + sender.extra_s + receiver.extra_s


# -- the directory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    peer: str
    addresses: tuple[str, ...]
    until: float
    status: bytes = b""


class MemoryDirectory:
    """What the DHT holds of the run: at most MAX_RECORDS records, each for RECORD_S after it was announced."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def announce(self, peer: str, addresses: Sequence[str], now: float) -> None:
        """Store a record, if there is room."""
        if peer not in self._entries and len(self._entries) >= MAX_RECORDS:
            self._entries = {entry.peer: entry for entry in self.entries(now)}
            if len(self._entries) >= MAX_RECORDS:
                return
        self._entries[peer] = _Entry(peer, tuple(addresses), now + RECORD_S)

    def entries(self, now: float) -> list[_Entry]:
        """All that have not expired."""
        return [entry for entry in self._entries.values() if entry.until > now]


class DirectoryClient:
    """The directory as one peer sees it: announcing and looking up. Implements membership's Lookup."""

    def __init__(self, host: MemoryHost, directory: MemoryDirectory, look_up_s: float) -> None:
        self._host, self._directory, self._look_up_s = host, directory, look_up_s

    async def members(self) -> Sequence[_Entry]:
        """See Lookup."""
        await asyncio.sleep(self._look_up_s)
        return self._directory.entries(asyncio.get_running_loop().time())

    async def announce_forever(self) -> None:
        """As a real node does."""
        while True:
            await asyncio.sleep(self._look_up_s)
            self._directory.announce(self._host.peer_id, [self._host.address], asyncio.get_running_loop().time())
            await asyncio.sleep(ANNOUNCE_S - self._look_up_s)


# -- compute ----------------------------------------------------------------------------------------------


class WaitingCompute:
    """Compute that only takes time: a sample every STEP_S times the peer's own speed. See `rounds.update.Compute`."""

    def __init__(self, peer: MemoryPeer, seed: int) -> None:
        self.ready = True
        self.samples = 0
        self.own_steps: list[int] = []
        self._peer = peer
        self._step_s = STEP_S * random.Random(f"{seed}/{peer.number}").uniform(*SPEEDS)  # noqa: S311 - reproducible
        self._gradient = np.full(LAYOUT.size, 1.0 + peer.number, np.float32)
        self._work: asyncio.Task[None] | None = None
        self._held = False

    async def begin(self, round_number: int) -> None:
        """See Compute."""
        self._end()
        self.samples = 0
        self._work = self._peer.host.spawn(self._gather())

    async def _gather(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            if not self._held:
                self.samples += 1
                self._peer.view.notify()

    def _end(self) -> None:
        if self._work is not None:
            self._work.cancel()

    async def finish(self, go_on: bool = False) -> Update | None:
        """See Compute."""
        self._end()
        self.own_steps = [1] * self.samples
        return Update(self.samples, 1.0, self._gradient)

    async def abandon(self) -> None:
        """See Compute."""
        self._end()

    async def hold(self, held: bool) -> None:
        """See Compute."""
        self._held = held

    async def park(self) -> None:
        """See Compute."""
        self._end()

    async def evaluate(self) -> float | None:
        """See Compute."""
        return None


# -- the whole ---------------------------------------------------------------------------------------------------------


class SimulatedPeer(MemoryPeer):
    """A peer that announces itself in the directory, and whose rounds go into the ledger."""

    def __init__(self, simulation: Simulation, number: int, disk: Disk | None = None) -> None:
        """disk: of a former life; else it begins at round 0."""
        super().__init__(simulation.swarm, number, disk)
        self._simulation = simulation
        self.view.watchers.append(self._on_phase)
        self._has_trained = False

    async def start(self) -> None:
        """See MemoryPeer."""
        await super().start()
        self.host.spawn(self.directory.announce_forever())

    def _on_round(self, record: RoundRecord) -> None:
        self._simulation.ledger.commit(self.number, record, self._simulation.now)

    def _on_phase(self, status: Status) -> None:
        if status.phase in ("joining", "arriving") and self._has_trained:
            self._simulation.ledger.caught_up += 1
        self._has_trained |= status.phase == "collecting"
