"""A swarm in memory: peers made of the real protocol, wired as the daemon wires them.

Membership, roster, votes, all-reduce, state and main loop are those of the library. Not real are the network
(`network`) and the compute process (`fakes`). A part may be replaced, see `Parts`; swarms of thousands are possible
with parts that are small enough.

    swarm = MemorySwarm(rounds=5)
    swarm.add(3)
    swarm.fail_at(peer=2, round=3, phase="exchange", how="kill")
    await swarm.start()
    await swarm.finish()

What does not live here: what strikes when (`faults`) and processes (`p2pllm_peers`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from p2pllm.averaging import DenseAllReduce, Exchange, exchange_of
from p2pllm.metrics import RoundRecord
from p2pllm.network.bulk import BulkServer
from p2pllm.network.membership import Lookup, Membership
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.keeper import StateKeeper
from p2pllm.rounds.loop import TrainingLoop
from p2pllm.rounds.messages import Phase, Status
from p2pllm.rounds.roster import RosterDesk
from p2pllm.rounds.round import RoundRunner
from p2pllm.rounds.serving import GIVE_WAY_S
from p2pllm.rounds.swarm import SwarmView
from p2pllm.rounds.update import Compute
from p2pllm.rounds.vote import VoteBox
from p2pllm.state import Layout, moments_of, outer_optimizer
from p2pllm.testing.fakes import LAYOUT, FakeCompute, make_manifest, make_state
from p2pllm.testing.faults import How, fail_at
from p2pllm.testing.network import MemoryNetwork, identity_number

HEARING_S = 10.0
"""How long a peer that knows others listens for them before it trains alone, as the daemon does."""

MAX_BOOTSTRAP = 8
"""Addresses that a new peer is given, as many as an invite holds."""

_POLL_S = 0.02


def _exchange(peer: MemoryPeer) -> Exchange:
    manifest = peer.swarm.manifest
    if manifest.round.strategy == "sparse_loco":
        return exchange_of(manifest, peer.disk.form(peer.swarm.layout), peer.host)
    return DenseAllReduce(peer.host, part_bytes=256)  # so that small vectors have several parts


def _first_hosts(peer: MemoryPeer) -> Sequence[str]:
    """Of the hosts that were there first."""
    hosts = peer.swarm.network.first(MAX_BOOTSTRAP + 1)
    return [host.address for host in hosts if host is not peer.host][:MAX_BOOTSTRAP]


def _fake(peer: MemoryPeer) -> Compute:
    return FakeCompute(peer.number, peer.keeper, peer.view.notify, peer.swarm.manifest.round.fragments)


@dataclass(frozen=True)
class Parts:
    """What peers are made of where it is not the default. Each is called once a peer, before it starts.

    layout: of the flat vector; the moments follow from the strategy.
    directory: where membership looks for others. bootstrap: addresses with which the peer starts, as of an invite.
    """

    layout: Layout = LAYOUT
    exchange: Callable[[MemoryPeer], Exchange] = _exchange
    compute: Callable[[MemoryPeer], Compute] = _fake
    directory: Callable[[MemoryPeer], Lookup | None] = lambda peer: None
    bootstrap: Callable[[MemoryPeer], Sequence[str]] = _first_hosts


class WatchedView(SwarmView):
    """A SwarmView that tells which phases its peer enters."""

    def __init__(self, peer_id: str, run_id: str, *, last_round: int) -> None:
        super().__init__(peer_id, run_id, last_round=last_round)
        self.watchers: list[Callable[[Status], None]] = []

    def say(self, **fields: Any) -> None:
        """See SwarmView."""
        super().say(**fields)
        if "phase" in fields:
            for watcher in list(self.watchers):
                watcher(self.own)


class MemoryPeer:
    """One peer, wired as the daemon wires it: `host`, `directory`, `view`, `membership`, `keeper`, `compute`, `desk`,
    `votes`, `exchange`, `loop` are its parts, `records` what it committed, `committed_at` when, by round.
    """

    def __init__(self, swarm: MemorySwarm, number: int, disk: Disk | None = None) -> None:
        """disk: of a former life; else it begins at round 0."""
        clock, manifest, parts = asyncio.get_running_loop().time, swarm.manifest, swarm.parts
        section, run_id = manifest.round, manifest.run_id
        self.swarm, self.number = swarm, number
        self.host = swarm.network.host(number)
        self.id = self.host.peer_id
        self.directory: Any = parts.directory(self)
        self.identity = identity_number(number)
        self.view = WatchedView(self.id, run_id, last_round=section.rounds)
        self.membership = Membership(
            self.host,
            status=self.view.own_bytes,
            on_status=self.view.hear,
            addresses=lambda: [self.host.address],
            directory=self.directory,
            clock=clock,
        )
        self.view.attach(self.membership)
        optimizer = outer_optimizer(manifest, swarm.layout)
        self.disk = disk or Disk(None, manifest, swarm.layout)
        state = self.disk.recover(optimizer, make_state(layout=swarm.layout))
        assert state is not None  # noqa: S101 - it was given one for round 0
        self.keeper = StateKeeper(state, optimizer, self.disk, self.host)
        self.keeper.serving.give_way = self._give_way
        self.compute: Any = parts.compute(self)
        self.desk = RosterDesk(self.host, self.view, section, run_id, clock)
        self.votes = VoteBox(self.host, self.view, self.identity)
        self.exchange: Any = parts.exchange(self)
        desk, votes, exchange = self.desk, self.votes, self.exchange
        runner = RoundRunner(self.identity, self.view, desk, votes, exchange, self.keeper, section)
        self.records: list[RoundRecord] = []
        self.committed_at: dict[int, float] = {}
        self.loop = TrainingLoop(manifest, self.view, self.desk, runner, self.keeper, self.compute, self._on_round)
        self.task: asyncio.Task[None] | None = None

    def _on_round(self, record: RoundRecord) -> None:
        self.records.append(record)
        self.committed_at[record.round] = asyncio.get_running_loop().time()

    async def start(self) -> None:
        """Serve, listen for the others, then train; returns when it serves."""
        others = self.swarm.parts.bootstrap(self)
        await self.host.spawn(self._serve(others), "start")
        self.task = self.host.spawn(self._live(bool(others)), f"peer {self.number}")

    async def _serve(self, others: Sequence[str]) -> None:
        await self.membership.start(others)
        await self.desk.start()
        await self.votes.start()
        await self.exchange.start()
        await BulkServer(self.host, self.keeper.serve).start()
        self.view.say(branch=self.keeper.branch, phase="joining")
        self.host.spawn(self._follow_membership(), "following membership")

    async def _follow_membership(self) -> None:
        """A peer that comes or goes may change what the round protocol waits for."""
        seen: frozenset[str] = frozenset()
        while True:
            seen = await self.membership.wait_changed(seen)
            self.view.notify()

    async def _give_way(self) -> None:
        await self.view.wait_until(lambda: self.view.own.phase != "exchange", GIVE_WAY_S)

    async def _live(self, expected: bool) -> None:
        if expected:
            await self.view.wait_until(lambda: bool(self.view.statuses()), HEARING_S)
        await self.loop.run()

    @property
    def alive(self) -> bool:
        """It was started, and is neither killed nor frozen."""
        return self.task is not None and not self.host.dead and not self.host.frozen

    async def leave(self) -> None:
        """What Ctrl+C does: end the round, say goodbye, and be gone."""
        self.loop.stop()
        if self.task is not None:
            await self.task
        self.view.say(phase="leaving", samples=0)
        await self.membership.stop()
        self.swarm.gone.add(self)
        self.host.kill()

    # -- faults ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """kill -9. `MemorySwarm.restart` starts it anew."""
        self.host.kill()
        # Its tasks are membership's own; a dead host says goodbye to nobody.
        ending = asyncio.create_task(self.membership.stop())
        self.swarm.ending.add(ending)
        ending.add_done_callback(self.swarm.ending.discard)

    def freeze(self) -> None:
        """SIGSTOP: it neither answers nor goes on, until `thaw`."""
        self.host.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self.host.thaw()

    def at(self, phase: Phase, round_: int, act: Callable[[], None], delay: float = 0.0) -> None:
        """Do something `delay` seconds after this peer enters a phase of the round after `round_`; once."""
        network = self.swarm.network

        def look(status: Status) -> None:
            if status.phase == phase and status.round == round_:
                self.view.watchers.remove(look)
                asyncio.get_running_loop().call_later(delay, act, context=network.context)

        self.view.watchers.append(look)


class MemorySwarm:
    """Peers of one run.

    peers: in the order in which they were added, so that their numbers are their indices. gone: those that are not
    waited for any more, beside the dead and the frozen. peer_class: what `add` makes.
    """

    peer_class: type[MemoryPeer] = MemoryPeer

    def __init__(self, *, network: MemoryNetwork | None = None, parts: Parts | None = None, **section: Any) -> None:
        """section: fields of the manifest's [round]; by default 5 rounds of 12 samples, see `make_manifest`."""
        self.parts = parts or Parts()
        self.manifest = make_manifest(self.parts.layout, **section)
        self.layout = self.parts.layout.with_moments(moments_of(self.manifest))
        self.network = network or MemoryNetwork()
        self.peers: list[MemoryPeer] = []
        self.gone: set[MemoryPeer] = set()
        self.ending: set[asyncio.Task[None]] = set()

    def add(self, count: int = 1) -> list[MemoryPeer]:
        """More peers, at round 0; they are not started."""
        new = [self.peer_class(self, len(self.peers) + index) for index in range(count)]
        self.peers += new
        return new

    async def start(self, *peers: MemoryPeer) -> None:
        """Start these, or all; returns when all serve, but before they have found each other."""
        for peer in peers or self.peers:
            await peer.start()

    def restart(self, peer: MemoryPeer, *, keep_disk: bool = True) -> MemoryPeer:
        """The killed peer anew, under its old number, with its old disk or an empty one; it is not started."""
        again = self.peer_class(self, peer.number, peer.disk if keep_disk else None)
        self.peers[peer.number] = again
        return again

    def fail_at(
        self,
        *,
        peer: int,
        round: int,  # noqa: A002 - it is the field's word
        phase: Phase,
        how: How,
        delay: float = 0.0,
        for_s: float = 0.0,
    ) -> None:
        """See `faults.fail_at`."""
        fail_at(self.peers[peer], round, phase, how, delay=delay, for_s=for_s)

    @property
    def alive(self) -> list[MemoryPeer]:
        """Those that were started and are there."""
        return [peer for peer in self.peers if peer.alive and peer not in self.gone]

    async def until(self, condition: Callable[[], bool], timeout: float = 300.0) -> None:
        """Let it run until `condition` holds.

        Raises TimeoutError after `timeout` virtual seconds, and whatever a living peer fails with at once.
        """
        async with asyncio.timeout(timeout):
            while not condition():
                for peer in self.alive:
                    if peer.task is not None and peer.task.done():
                        peer.task.result()
                await asyncio.sleep(_POLL_S)

    async def finish(self, timeout: float = 300.0) -> None:
        """Until all living peers have come to the run's end, at one head; checks that their states are that head."""
        last = self.manifest.round.rounds
        await self.until(lambda: all(peer.keeper.head[0] >= last for peer in self.alive), timeout)
        await self.until(lambda: len({peer.keeper.head for peer in self.alive}) == 1, timeout)
        self.check_states()
        # Whoever saw one off is gone before the next one ends, so all are waited for at once.
        await asyncio.gather(*(peer.task for peer in self.alive if peer.task is not None))

    def check_states(self) -> None:
        """Raise AssertionError unless every living peer's head is what its state really is."""
        for peer in self.alive:
            state, (round_, _) = peer.keeper.state, peer.keeper.head
            record = peer.disk.log.record(round_) if round_ else None
            named = record.body.state.hex() if record else self.manifest.initial_state
            if (state.round, state.digest()) != (round_, named):
                raise AssertionError(f"Peer {peer.number} is not in the state of round {round_} that its log names.")

    def check_rounds(self) -> None:
        """Raise AssertionError if a round was committed with different outcomes, be it by peers that are dead now."""
        seen: dict[int, dict[tuple[str, str], int]] = {}
        for peer in self.peers:
            for record in peer.records:
                seen.setdefault(record.round, {}).setdefault(
                    (record.aggregate_digest, record.state_digest), peer.number
                )
        for round_, outcomes in seen.items():
            if len(outcomes) > 1:
                raise AssertionError(f"Round {round_} was committed with {len(outcomes)} outcomes: {outcomes}.")
