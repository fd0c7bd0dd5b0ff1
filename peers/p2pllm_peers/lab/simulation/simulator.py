"""The control plane of swarms of any size, simulated: the real protocol on a virtual clock and a network in memory.

Membership, rosters, votes, state and the main loop are the library's, unchanged. Not real are the network, the compute,
which only waits, the exchange, which moves 4 floats with as many messages as the real one opens streams, and the DHT,
of which there is only the directory (its own messages are not counted). Where the protocol is used beyond what it was
made for, the result shows what then happens.

    result = simulate(Setting(peers=100, rounds=3))

What does not live here: the parts of a simulated peer (`parts`, `exchange`), what is counted
(`ledger`), and a process for each size (`process`).
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from p2pllm.averaging import Group
from p2pllm.errors import UsageError
from p2pllm.network.table import MAX_MEMBERS
from p2pllm.sections import RoundSection
from p2pllm.testing.clock import run
from p2pllm.testing.swarm import MemoryPeer, MemorySwarm, Parts
from p2pllm_peers.lab.simulation.exchange import FewFloats
from p2pllm_peers.lab.simulation.ledger import Ledger, Traffic, islands, notes
from p2pllm_peers.lab.simulation.parts import (
    COMPUTE_S,
    LAYOUT,
    LOOK_UP_HOPS,
    STEP_S,
    CoarseLoop,
    DirectoryClient,
    MemoryDirectory,
    PathNetwork,
    SimulatedPeer,
    WaitingCompute,
)

ARRIVAL_S = 5.0
"""Virtual seconds in which all peers start, evenly."""

PEER_SECONDS = 300_000.0
"""Bound on peers times virtual seconds of one simulation; the largest swarms are simulated for a shorter time."""

LONGEST_ROUND_S = 4 * COMPUTE_S
"""A simulation ends after so many virtual seconds a round, whatever has become of it."""

AWAY_S = (5.0, 15.0)
"""How long a churned peer is away or frozen, virtual seconds."""

MAX_PEERS = 100_000

_LOOK_S = 0.5
_SETTLED_S = 1.0  # after the first commit the others' votes are still under way

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What is simulated. churn: faults an hour for each 100 peers. delay_ms: one way, least and most."""

    peers: int
    rounds: int = 3
    churn: float = 0.0
    delay_ms: tuple[float, float] = (20.0, 80.0)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be simulated."""
        low, high = self.delay_ms
        for holds, sentence in (
            (1 <= self.peers <= MAX_PEERS, f"--peers is {self.peers}, but must be from 1 to {MAX_PEERS}."),
            (1 <= self.rounds <= 1000, f"--rounds is {self.rounds}, but must be from 1 to 1000."),
            (0 <= self.churn <= 3600, f"--churn is {self.churn:g}, but must be from 0 to 3600 faults an hour."),
            (
                0 < low <= high <= 2000,
                f"--delay-ms is {low:g} {high:g}, but must be two rising numbers above 0 and at most 2000.",
            ),
        ):
            if not holds:
                raise UsageError(sentence)

    @property
    def limit_s(self) -> float:
        """Virtual seconds after which the simulation ends."""
        return min(ARRIVAL_S + LONGEST_ROUND_S * (1 + self.rounds), PEER_SECONDS / self.peers)


class Simulation:
    """One swarm of one size from its first peer to its end."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ledger = Ledger(setting.rounds)
        low, high = setting.delay_ms
        network = PathNetwork(low / 1000, high / 1000, setting.seed)
        directory, look_up_s = MemoryDirectory(), LOOK_UP_HOPS * network.mean_s
        parts = Parts(
            layout=LAYOUT,
            exchange=lambda peer: FewFloats(peer.host, lambda group: self._on_attempt(peer, group)),
            compute=lambda peer: WaitingCompute(peer, setting.seed),
            directory=lambda peer: DirectoryClient(peer.host, directory, look_up_s),
        )
        # A round ends when those whom one peer can see have worked for COMPUTE_S on average.
        samples = round(min(setting.peers, MAX_MEMBERS + 1) * COMPUTE_S / STEP_S)
        section = RoundSection(rounds=setting.rounds, samples=samples, deadline_s=1.5 * COMPUTE_S)  # the rest: defaults
        self.swarm = MemorySwarm(network=network, parts=parts, **section.model_dump())
        self._loop = asyncio.get_running_loop()
        self._begin = self._loop.time()
        self._away: set[int] = set()
        self._peer_seconds = 0.0
        self._all_known_s: float | None = None
        self._formed: Traffic | None = None

    @property
    def now(self) -> float:
        """Virtual seconds since the first peer started."""
        return self._loop.time() - self._begin

    def _on_attempt(self, peer: MemoryPeer, group: Group) -> None:
        self.ledger.attempt(group, peer.keeper.head[0], self.now)

    # -- what happens --------------------------------------------------------------------------------------------------

    async def run(self, progress: Progress) -> dict[str, Any]:
        """Let them come, train, fail and return; returns the record of this size."""
        work = [asyncio.create_task(self._arrive())]
        if self.setting.churn:
            work.append(asyncio.create_task(self._churn()))
        told = time.monotonic()
        while not self._is_complete() and self.now < self.setting.limit_s:
            await asyncio.sleep(_LOOK_S)
            self._look()
            if time.monotonic() - told > 1:
                told = time.monotonic()
                done = min((peer.keeper.head[0] for peer in self.swarm.alive), default=0)
                progress(f"{self.setting.peers:,} peers, {self.now:.1f} virtual s, all have done {done} rounds")
        for task in work:
            task.cancel()
            if task.done() and not task.cancelled():
                task.result()  # what failed here must not go unnoticed
        return self._result()

    async def _arrive(self) -> None:
        for number in range(self.setting.peers):
            due = ARRIVAL_S * number / self.setting.peers
            if due > self.now:
                await asyncio.sleep(due - self.now)
            self.swarm.peers.append(peer := SimulatedPeer(self, number))
            await peer.start()

    async def _churn(self) -> None:
        """Poisson faults: a random peer is killed, is frozen, or leaves, and returns."""
        chance = random.Random(f"{self.setting.seed}/churn")  # noqa: S311 - the same in every run
        hourly = self.setting.churn * self.setting.peers / 100
        await asyncio.sleep(ARRIVAL_S)
        async with asyncio.TaskGroup() as under_way:
            while True:
                await asyncio.sleep(chance.expovariate(hourly / 3600))
                here = [peer for peer in self.swarm.alive if peer.number not in self._away]
                if here:
                    how = chance.choice(("kill", "freeze", "leave"))
                    under_way.create_task(self._fail(chance.choice(here), how, chance.uniform(*AWAY_S)))

    async def _fail(self, peer: MemoryPeer, how: str, away_s: float) -> None:
        self.ledger.faults[how] += 1
        self._away.add(peer.number)
        if how == "freeze":
            peer.freeze()
            await asyncio.sleep(away_s)
            peer.thaw()
        else:
            if how == "kill":
                peer.kill()
            else:
                await peer.leave()
            await asyncio.sleep(away_s)
            again = SimulatedPeer(self, peer.number, peer.disk)
            self.swarm.peers[peer.number] = again
            await again.start()
        self._away.discard(peer.number)

    # -- what is seen --------------------------------------------------------------------------------------------------

    def _is_complete(self) -> bool:
        """Everybody is there and has done all rounds, but for those for whom there is no room."""
        peers = [peer for peer in self.swarm.alive if not peer.view.is_turned_away()]
        return (
            len(self.swarm.peers) == self.setting.peers
            and not self._away
            and all(peer.keeper.head[0] >= self.setting.rounds for peer in peers)
        )

    def _look(self) -> None:
        """Note what comes about only slowly."""
        peers = self.swarm.alive
        for peer in peers:
            if peer.task is not None and peer.task.done():
                peer.task.result()  # what failed in a peer must not look like a fault of the protocol
        self.ledger.present = len(peers)
        self._peer_seconds += _LOOK_S * len(peers)
        if self._formed is None and self.now >= self.ledger.first_commit_s + _SETTLED_S:
            self._formed = self._traffic()
        if self._all_known_s is None and len(self.swarm.peers) == self.setting.peers:
            most = min(len(peers) - 1, MAX_MEMBERS)
            if all(len(peer.membership.alive()) >= most for peer in peers):
                self._all_known_s = self.now

    def _traffic(self) -> Traffic:
        return Traffic.of(self.swarm.network.hosts.values(), self._peer_seconds)

    def _known(self) -> dict[str, Any]:
        """Who knows whom at the end."""
        links = {peer.id: peer.membership.alive() for peer in self.swarm.alive}
        counts = [len(others) for others in links.values()]
        most = max(1, min(len(links) - 1, MAX_MEMBERS))
        parts = islands(links)
        return {
            "possible": most,
            "mean": round(statistics.mean(counts), 2),
            "least": min(counts),
            "share": round(statistics.mean(min(1.0, count / most) for count in counts), 4),
            "all_known_s": self._all_known_s,
            "islands": len(parts),
            "largest_island": round(parts[0] / len(links), 4),
        }

    def _result(self) -> dict[str, Any]:
        whole = self._traffic()
        formed = self._formed or whole
        heads = Counter(peer.keeper.head for peer in self.swarm.alive)
        result = {
            **asdict(self.setting),
            "virtual_s": round(self.now, 1),
            "complete": self._is_complete(),
            "started": len(self.swarm.peers),
            "known": self._known(),
            "turned_away": sum(1 for peer in self.swarm.alive if peer.view.is_turned_away()),
            "messages": sum(messages for messages, _ in whole.kinds.values()),
            "forming": formed.since(Traffic()),
            "training": whole.since(formed),
            **self.ledger.rounds(len(self.swarm.peers)),
            "heads": len(heads),
            "main_head": round(max(heads.values()) / heads.total(), 4),
        }
        return {**result, "notes": notes(result)}


def simulate(setting: Setting, progress: Progress = lambda text: None) -> dict[str, Any]:
    """Simulate one size in this process; the same setting gives the same result, but for `real_s` and `cpu_s`.

    progress: called with a line of text about once a second.
    """

    async def whole() -> dict[str, Any]:
        return await Simulation(setting).run(progress)

    real, cpu = time.perf_counter(), time.process_time()
    before, thresholds = random.getstate(), gc.get_threshold()
    random.seed(setting.seed)  # hearsay is a random choice
    gc.set_threshold(100_000, 50, 100)  # millions of objects, hardly any in circles
    try:
        result = run(whole(), CoarseLoop)
    finally:
        random.setstate(before)
        gc.set_threshold(*thresholds)
    return {**result, "real_s": round(time.perf_counter() - real, 2), "cpu_s": round(time.process_time() - cpu, 2)}
