"""Participant: the library's parts, put together into one peer of one run.

What is wired here and nowhere else: node, membership, view, all-reduce, roster, votes, keeper, loop. `daemon`
starts and ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from p2pllm.averaging import codec, exchange_of
from p2pllm.errors import StateError
from p2pllm.invite import MAX_ADDRESSES, Invite
from p2pllm.metrics import JsonlSink, RoundRecord
from p2pllm.network.bulk import Blob, BulkServer
from p2pllm.network.lookback import Lookback
from p2pllm.network.membership import Membership
from p2pllm.network.node import Node
from p2pllm.network.reachability import Reachability
from p2pllm.rounds.credit import Ledger
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.keeper import StateKeeper
from p2pllm.rounds.loop import TrainingLoop
from p2pllm.rounds.record import Checkpoint
from p2pllm.rounds.roster import RosterDesk
from p2pllm.rounds.round import RoundRunner
from p2pllm.rounds.serving import GIVE_WAY_S
from p2pllm.rounds.swarm import SwarmView
from p2pllm.rounds.vote import VoteBox
from p2pllm.settings import PeerSettings
from p2pllm.settings_file import with_changes
from p2pllm.state import Layout, OuterOptimizer, SharedState, check_arithmetic, outer_optimizer
from p2pllm_peers.devices import Devices
from p2pllm_peers.entry import Sealed, serve_manifest, tokenizer_blob
from p2pllm_peers.folders import PeerFolder
from p2pllm_peers.guest import PAUSE_FILE, Guest
from p2pllm_peers.linkmap import LinkMap
from p2pllm_peers.meter import Meter
from p2pllm_peers.neighbours import Part, running_peers, watch_neighbours
from p2pllm_peers.pace import Pace, Paces, serve_pace
from p2pllm_peers.status import Status
from p2pllm_peers.throttle import Throttle

log = logging.getLogger(__name__)

HEARING_S = 10.0
"""How long a peer that knows others listens for them before it trains alone."""

ANNOUNCED_S = 60.0
"""How much longer if the DHT says that the run goes on: as long as a record in it lasts."""

NOT_BEFORE_THE_NEXT_START = (
    "the system lets nobody but root raise the priority of what runs, so nice counts from its next start."
)

RELAYS_UNTIL_THE_NEXT_START = (
    "this peer relays for peers behind routers until its next start, which is neither slowed nor counted."
)

_NOTHING = np.zeros(0, np.float32)

Progress = Callable[[str], None]


class Participant:
    """One peer of one run while its daemon lives."""

    def __init__(
        self,
        folder: PeerFolder,
        sealed: Sealed,
        settings: PeerSettings,
        node: Node,
        compute: Devices,
    ) -> None:
        manifest = sealed[0]
        self.folder = folder
        self._sealed = sealed
        self._manifest = manifest
        self._run_id = manifest.run_id  # which hashes the manifest
        self._settings = settings
        self._node = node
        self._compute = compute
        self.view = SwarmView(node.peer_id, self._run_id, last_round=manifest.round.rounds)
        self._records = JsonlSink(folder.path / "rounds.jsonl")
        self._status = Status(manifest, folder.name, node, self.view, compute)
        self._paces = Paces()
        self.links = LinkMap(node, self._status.links, self.view.statuses)
        self._membership: Membership | None = None
        self._following: asyncio.Task[None] | None = None
        self._minding: list[asyncio.Task[None]] = []
        self._keeper: StateKeeper | None = None

    @property
    def keeper(self) -> StateKeeper:
        """The state of this peer; there is one once `start` has returned."""
        if self._keeper is None:
            raise StateError("This peer has no state yet; wait until it takes part in the run.")
        return self._keeper

    async def start(self, addresses: tuple[str, ...], progress: Progress) -> None:
        """Join the membership, build the model, and come to the swarm's head."""
        node = self._node
        if addresses and not (self.folder.path / "log").exists():
            await node.connect_any(addresses)  # without a state there is nothing to go on with alone
        membership = self._membership = Membership(
            node,
            status=self.view.own_bytes,
            on_status=self.view.hear,
            addresses=node.addresses,
            directory=node.directory,
            saved=self.folder.path / "peers.json",
        )
        self.view.attach(membership)
        node.directory.status, membership.on_announced = self.view.own_bytes, self.view.hear_announced
        node.on_reconnect = membership.push  # else some peers would hear of us only by their own next probe
        await serve_manifest(node, self._sealed)
        await Lookback(node).start()
        await membership.start(addresses)
        self._following = asyncio.create_task(self._follow_membership(membership))
        if self._settings.nat and not self._settings.announce:  # who says where it is dialled knows better
            told = self.folder.remember_reach
            reachability = Reachability(node, lambda: _living(membership), self._give_way, told)
            self._minding.append(asyncio.create_task(reachability.run()))
        await asyncio.to_thread(codec(self._manifest.round.codec).encode, _NOTHING)  # loads what it needs
        self._assemble(*await self._recover(progress))
        await self._desk.start()
        await self._votes.start()
        await self._exchange.start()
        await BulkServer(node, self._serve).start()
        await serve_pace(node, self._pace)
        await self.links.serve()
        await self._hear_the_swarm(bool(addresses or membership.known()), progress)

    async def _follow_membership(self, membership: Membership) -> None:
        """A peer that comes or goes may change what the round protocol waits for."""
        seen: frozenset[str] = frozenset()
        while True:
            seen = await membership.wait_changed(seen)
            self.view.notify()

    async def _recover(self, progress: Progress) -> tuple[Disk, OuterOptimizer, SharedState]:
        """Come to the newest state that this peer's disk leads to, while the worker builds the model.

        Who has no state begins with the model's initial parameters, and must wait for them.
        """
        compute, manifest, timeout = self._compute, self._manifest, self._settings.startup_timeout_s
        check_arithmetic()
        compute.belongs_to(self._run_id, self._node.peer_id, self.folder.path)
        if not compute.ready:  # sealing a run builds it
            progress("building the model")
            layout = compute.remembered_layout(manifest)
            if layout is not None:
                disk, optimizer = self._disk(layout), outer_optimizer(manifest, layout)
                state = disk.recover(optimizer, None)
                if state is not None:
                    await compute.resume(manifest, self._sealed[2], timeout, layout)
                    return disk, optimizer, state
                disk.close()
            await compute.build(manifest, self._sealed[2], timeout)
        disk, optimizer = self._disk(compute.layout), outer_optimizer(manifest, compute.layout)
        initial = SharedState.initial(compute.layout, compute.params)
        return disk, optimizer, disk.recover(optimizer, initial) or initial

    def _disk(self, layout: Layout) -> Disk:
        return Disk(self.folder.path, self._manifest, layout, budget=int(self._settings.disk_gb * 1e9))

    def _assemble(self, disk: Disk, optimizer: OuterOptimizer, state: SharedState) -> None:
        """Put the round protocol on top of a state."""
        manifest, view, compute, identity = self._manifest, self.view, self._compute, self._node.identity
        section, layout = manifest.round, state.layout
        np.copyto(compute.params, state.params)  # the worker maps this memory
        state = SharedState(layout, [compute.params, *state.moments.values()], round=state.round)
        keeper = self._keeper = StateKeeper(state, optimizer, disk, self._node)
        keeper.serving.give_way = self._give_way
        self._desk = RosterDesk(self._node, view, section, self._run_id)
        self._votes = VoteBox(self._node, view, identity)
        self._exchange = exchange_of(manifest, disk.form(layout), self._node, self.folder.path)
        runner = RoundRunner(identity, view, self._desk, self._votes, self._exchange, keeper, section)
        self._ledger = Ledger(disk.log, self._node.peer_id)
        self.loop = TrainingLoop(manifest, view, self._desk, runner, keeper, compute, self._on_round)
        note, self._meter = self.folder.path / PAUSE_FILE, Meter(self.folder.path, self._moved)
        self.guest = Guest(self._settings, note, self.loop.pause, self.loop.resume, self._meter.used)
        self._throttle = Throttle(lambda: compute.pids, compute.share)
        self._share(running_peers(self._settings.home))
        watching = watch_neighbours(self._settings.home, self._share)
        self._minding += [asyncio.create_task(mind) for mind in (self.guest.run(), self._throttle.run(), watching)]

    async def _give_way(self) -> None:
        """Rounds go before joiners, and before a p2pd that is to be another."""
        await self.view.wait_until(lambda: self.view.own.phase != "exchange", GIVE_WAY_S)

    async def _hear_the_swarm(self, expected: bool, progress: Progress) -> None:
        """Listen who is there before the first round, so that nobody trains alone beside a swarm."""
        view = self.view
        view.say(branch=self.keeper.branch, phase="joining")
        if expected:
            progress("listening for the swarm")
            await view.wait_until(lambda: bool(view.statuses()), HEARING_S)
        if self.keeper.branch.total == 0 and not view.statuses() and view.announced.total > 0:
            # The run goes on somewhere, or did a minute ago: to begin it anew beside it would be a fork.
            progress("the run has been announced; looking for who holds it")
            await view.wait_until(lambda: bool(view.statuses()), ANNOUNCED_S)
        if not self.keeper.has_state:
            progress("this machine makes other initial weights than the founder's; it takes the run's from a peer")

    async def _serve(self, request: dict[str, Any]) -> Blob | None:
        if self.guest.is_spent:  # to say that we have nothing would be a lie, for which others doubt a peer
            raise ConnectionRefusedError("the traffic of this month has been moved")
        return tokenizer_blob(self._sealed, request) or await self.keeper.serve(request)

    def _on_round(self, record: RoundRecord) -> None:
        """Keep what a round measured."""
        record = replace(record, traffic=self._status.traffic())
        try:
            self._records.write(record)
        except OSError as error:
            log.error("round %d is not recorded in %s: %s", record.round, self.folder.path, error.strerror)
        self._status.note(record)
        self._paces.add(record)
        self.view.say(tokens_per_s=self._compute.tokens_per_s)

    def set(self, values: dict[str, Any]) -> list[str]:
        """Go by these settings from now on; returns a sentence for each that has to wait for the next start.

        Raises SettingsError if they are not valid; then nothing has changed.
        """
        self._settings = settings = with_changes(self._settings, values)
        self.guest.change(settings)
        self._limit(settings)
        later = []
        if {"nice", "io_idle"} & set(values) and not self._compute.stand_back(settings.nice, settings.io_idle):
            later.append(NOT_BEFORE_THE_NEXT_START)
        if self._node.relays_for_others and any(values.get(name) for name in ("upload_mbit", "monthly_gb")):
            later.append(RELAYS_UNTIL_THE_NEXT_START)
        return later

    def _share(self, peers: int) -> None:
        """So many peers run on this machine."""
        self._peers_here = peers
        self._limit(self._settings)

    def _limit(self, settings: PeerSettings) -> None:
        part = Part.of(settings, self._peers_here)
        self._throttle.cpu_percent, self._throttle.duty_percent = part.cpu_percent, settings.duty_percent
        self.keeper.disk.budget = int(settings.disk_gb * 1e9)
        traffic = self._node.traffic
        traffic.pacer.mbit, traffic.intake.mbit = part.upload_mbit, part.download_mbit

    def _moved(self) -> int:
        return self._node.traffic.sent + self._node.traffic.received

    async def anchor(self, checkpoint: bytes) -> bool:
        """Take the organiser's packed checkpoint and let the others know; whether it was new.

        Raises ValueError and StateError for one that is not valid.
        """
        new = await self.keeper.anchor(Checkpoint.unpack(checkpoint))
        self.view.say(branch=self.keeper.branch)
        return new

    def invite(self) -> str:
        """The string with which others join: where we are now, and one address of each of a few living members.

        So an invite still works when the peer that printed it is gone.
        """
        addresses = self._node.addresses()[: MAX_ADDRESSES // 2]
        if self._membership is not None:
            known = self._membership.known()
            addresses += [known[peer][0] for peer in sorted(self._membership.alive()) if known.get(peer)]
        return Invite(self._run_id, self._manifest.founder, tuple(addresses[:MAX_ADDRESSES])).encode()

    def status(self) -> dict[str, Any]:
        """What `p2pllm status` shows."""
        return self._status.answer(self.loop, self._ledger, self._settings, self.invite())

    def _pace(self) -> Pace:
        return self._paces.of(self.status(), (self.folder.path / "log").stat().st_size)

    async def stop(self) -> None:
        """Say goodbye and close the files: all that was committed is in them."""
        for task in (*self._minding, self._following):
            if task is not None:
                task.cancel()
        self.links.close()
        ending = []
        if self._keeper is not None:
            self._meter.save()
            self._ledger.close()
            self.view.say(phase="leaving", samples=0)
            ending.append(self._keeper.close())
            ending.append(asyncio.to_thread(self._exchange.close))
        if self._membership is not None:
            ending.append(self._membership.stop())
        outcomes = await asyncio.gather(*ending, return_exceptions=True)
        self._records.close()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


def _living(membership: Membership) -> dict[str, tuple[str, ...]]:
    known = membership.known()
    return {peer: known.get(peer, ()) for peer in sorted(membership.alive())}
