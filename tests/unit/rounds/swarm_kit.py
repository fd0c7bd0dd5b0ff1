"""A swarm in memory: real protocol, real membership, real all-reduce.

Only two things are not the real ones: the transport (`jumping_network`) and the compute process, whose gradients
are a function of (parameters, peer, round).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from jumping_network import Network, peer_number, virtual

from p2pllm.averaging import DenseAllReduce
from p2pllm.manifest import RunDraft, RunManifest
from p2pllm.metrics import RoundRecord
from p2pllm.network.bulk import BulkServer
from p2pllm.network.membership import Membership
from p2pllm.rounds import plan
from p2pllm.rounds.keeper import StateKeeper
from p2pllm.rounds.loop import TrainingLoop
from p2pllm.rounds.messages import Status
from p2pllm.rounds.roster import RosterDesk
from p2pllm.rounds.round import RoundRunner, Update
from p2pllm.rounds.swarm import SwarmView
from p2pllm.rounds.vote import VoteBox
from p2pllm.state import AdamW, Layout, SharedState

__all__ = [
    "LAYOUT",
    "FakeCompute",
    "Network",
    "Peer",
    "Swarm",
    "head",
    "make_manifest",
    "make_state",
    "peer_number",
    "status",
    "virtual",
]

LAYOUT = Layout.of([("matrix", (20, 30)), ("vector", (37,))])


# -- the compute process ---------------------------------------------------------------------------------------


class FakeCompute:
    """Gathers `batch` samples every `step_s` seconds; its gradient depends on parameters, peer and round alone."""

    def __init__(self, number: int, keeper: StateKeeper, notify: Callable[[], None]) -> None:
        self.number, self.keeper, self.notify = number, keeper, notify
        self.ready = True
        self.samples = 0
        self.own_steps: list[int] = []
        self.batch, self.step_s = 4, 0.1
        self.fruitless = 0
        self.finished = 0
        self.abandoned = 0
        self._round = -1
        self._gradient = np.zeros(LAYOUT.size, np.float32)
        self._work: asyncio.Task[None] | None = None

    async def begin(self, round_number: int) -> None:
        self._end()
        self.samples, self._round = 0, round_number
        noise = np.random.default_rng([self.number, round_number]).standard_normal(LAYOUT.size)
        self._gradient = (self.keeper.state.params * np.float32(0.1) + noise.astype(np.float32)).astype(np.float32)
        self._work = asyncio.create_task(self._gather())

    async def _gather(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            self.samples += self.batch
            self.notify()

    def _end(self) -> None:
        if self._work is not None:
            self._work.cancel()

    async def finish(self) -> Update | None:
        self._end()
        self.finished += 1
        if self.fruitless:
            self.fruitless -= 1
            return None
        self.own_steps = [self.batch] * (self.samples // self.batch)
        return Update(self.samples, 1.0, self._gradient)

    async def abandon(self) -> None:
        self._end()
        self.abandoned += 1

    async def evaluate(self) -> float | None:
        return 2.0


# -- peers and swarms ------------------------------------------------------------------------------------------


class WatchedView(SwarmView):
    """A SwarmView that tells which phases its peer goes through."""

    on_phase: Callable[[Status], None] | None = None

    def say(self, **fields: Any) -> None:
        super().say(**fields)
        if self.on_phase is not None and "phase" in fields:
            self.on_phase(self.own)


def make_state(round_: int = 0, seed: int = 0) -> SharedState:
    """A state of small random parameters; with `round_`, as if so many steps had been made."""
    params = np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32)
    state = SharedState.initial(LAYOUT, params)
    if round_:
        state.round, state.beta1_power, state.beta2_power = round_, 0.5, 0.5
    return state


def make_manifest(**section: Any) -> RunManifest:
    """A run of small rounds."""
    values = {"rounds": 5, "samples": 12, "deadline_s": 5.0, "roster_wait_s": 2.0, **section}
    draft = RunDraft.model_validate({"round": values, "data": {"validation_every": 3}})
    return draft.seal(founder=peer_number(0), initial_state=make_state().digest(), tokenizer="bytes", data_digest="")


class Peer:
    """One peer, wired as the daemon wires it."""

    def __init__(self, swarm: Swarm, number: int, state: SharedState | None = None) -> None:
        loop, manifest = asyncio.get_running_loop(), swarm.manifest
        self.swarm, self.number = swarm, number
        self.host = swarm.network.host(number)
        self.id = self.host.peer_id
        section, run_id = manifest.round, manifest.run_id
        initial = bytes.fromhex(manifest.initial_state)
        self.view = WatchedView(self.id, initial_state=initial, last_round=section.rounds)
        self.membership = Membership(
            self.host,
            status=self.view.own_bytes,
            on_status=self.view.hear,
            addresses=lambda: [self.host.address],
            clock=loop.time,
        )
        self.view.attach(self.membership)
        optimizer = AdamW(manifest.optimizer, section.rounds, LAYOUT)
        self.keeper = StateKeeper(state or make_state(), optimizer, self.host)
        self.compute = FakeCompute(number, self.keeper, self.view.notify)
        self.desk = RosterDesk(self.host, self.view, section, run_id, loop.time)
        self.votes = VoteBox(self.host, self.view)
        self.allreduce = DenseAllReduce(self.host, part_bytes=256)
        runner = RoundRunner(self.view, self.desk, self.votes, self.allreduce, self.keeper, section, run_id)
        self.records: list[RoundRecord] = []
        self.committed_at: dict[int, float] = {}
        self.loop = TrainingLoop(manifest, self.view, self.desk, runner, self.keeper, self.compute, self._on_round)
        self.task: asyncio.Task[None] | None = None

    def _on_round(self, record: RoundRecord) -> None:
        self.records.append(record)
        self.committed_at[record.round] = asyncio.get_running_loop().time()

    async def start(self) -> None:
        """Serve, listen for the others, then train."""
        others = [host.address for host in self.swarm.network.hosts.values() if host is not self.host]
        await self.membership.start(others)
        await self.desk.start()
        await self.votes.start()
        await self.allreduce.start()
        await BulkServer(self.host, self.keeper.serve).start()
        self.view.say(head=self.keeper.head, phase="joining")
        self.task = asyncio.create_task(self._live(bool(others)))

    async def _live(self, expected: bool) -> None:
        if expected:
            await self.view.wait_until(lambda: bool(self.view.statuses()), 10.0)
        await self.loop.run()

    def kill(self) -> None:
        """kill -9."""
        self.swarm.network.kill(self.id)
        self._stop_tasks()

    def freeze(self) -> None:
        """SIGSTOP, for good: it neither answers nor goes on."""
        self.swarm.network.hung.add(self.id)
        self._stop_tasks()

    def _stop_tasks(self) -> None:
        assert self.task is not None
        self.task.cancel()
        self.swarm.lost.add(self)
        for task in self.host.tasks:
            task.cancel()

    def at(self, phase: str, round_: int, act: Callable[[], None], delay: float = 0.0) -> None:
        """Do something `delay` seconds after this peer enters a phase of the round after `round_`; once."""

        def look(status: Status) -> None:
            if status.phase == phase and status.round == round_:
                self.view.on_phase = None
                asyncio.get_running_loop().call_later(delay, act)

        self.view.on_phase = look


class Swarm:
    """Peers of one run."""

    def __init__(self, **section: Any) -> None:
        self.manifest = make_manifest(**section)
        self.network = Network()
        self.peers: list[Peer] = []
        self.lost: set[Peer] = set()

    async def add(self, count: int = 1, state: SharedState | None = None) -> list[Peer]:
        """More peers; they are not started."""
        new = [Peer(self, len(self.peers) + index, state) for index in range(count)]
        self.peers += new
        return new

    async def start(self, *peers: Peer) -> None:
        """Start these, or all."""
        for peer in peers or self.peers:
            await peer.start()

    @property
    def alive(self) -> list[Peer]:
        return [peer for peer in self.peers if peer not in self.lost and peer.task is not None]

    async def until(self, condition: Callable[[], bool], timeout: float = 300.0) -> None:
        """Let it run until `condition` holds; fails after so many virtual seconds, and at once if a peer fails."""
        async with asyncio.timeout(timeout):
            while not condition():
                for peer in self.alive:
                    if peer.task is not None and peer.task.done():
                        peer.task.result()
                await asyncio.sleep(0.02)

    async def finish(self, timeout: float = 300.0) -> None:
        """Until all living peers have come to the run's end, at one head."""
        last = self.manifest.round.rounds
        await self.until(lambda: all(peer.keeper.head[0] >= last for peer in self.alive), timeout)
        await self.until(lambda: len({peer.keeper.head for peer in self.alive}) == 1, timeout)
        self.check_states()
        # Whoever saw one off is gone before the next one ends, so all are waited for at once.
        await asyncio.gather(*(peer.task for peer in self.alive if peer.task is not None))

    def check_states(self) -> None:
        """Whoever is at one head holds the same bits, and the head is what the state really is."""
        for peer in self.alive:
            assert peer.keeper.head == (peer.keeper.state.round, bytes.fromhex(peer.keeper.state.digest()))

    def check_rounds(self) -> None:
        """No round was committed twice with different outcomes, by the dead neither."""
        seen: dict[int, set[tuple[str, str]]] = {}
        for peer in self.peers:
            for record in peer.records:
                seen.setdefault(record.round, set()).add((record.aggregate_digest, record.state_digest))
        assert all(len(outcomes) == 1 for outcomes in seen.values()), seen


def status(round_: int, digest: bytes | int = 0, phase: str = "collecting", samples: int = 0) -> Status:
    """A status in few words; a number stands for a digest."""
    whole = bytes([digest]) * 32 if isinstance(digest, int) else digest
    return Status.model_validate(
        {"round": round_, "digest": whole, "phase": phase, "samples": samples, "tokens_per_s": 0.0}
    )


def head(round_: int, digest: int = 0) -> plan.Head:
    return (round_, bytes([digest]) * 32)
