"""The main loop of a peer: compute until the swarm has its samples, average, step, again.

`TrainingLoop.run` decides again and again what is next, and does that; `_train` is one round, and can be read from top
to bottom. Methods stand in the order in which they are called. The loop knows the compute process only as `Compute`,
the network only through `RosterDesk`, `RoundRunner` and `StateKeeper`, and does no input or output of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from p2pllm.errors import StateError
from p2pllm.manifest import RunManifest
from p2pllm.metrics import RoundRecord
from p2pllm.rounds import plan
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.keeper import StateKeeper
from p2pllm.rounds.messages import Phase
from p2pllm.rounds.pending import Pending
from p2pllm.rounds.record import Head, Record
from p2pllm.rounds.report import round_record
from p2pllm.rounds.roster import RosterDesk
from p2pllm.rounds.round import RoundResult, RoundRunner
from p2pllm.rounds.swarm import SwarmView
from p2pllm.rounds.update import Compute

log = logging.getLogger(__name__)

FAREWELL_S = 20.0
"""How long a peer that is done stays to serve those who are behind."""

ROOM_S = 60.0
"""How often a peer for which the swarm has no room says so in its log."""

RETRY_S = 1.0
"""Pause after an update or a state could not be had."""

MEND_S = 30.0
"""The longest pause between two tries on a disk that takes nothing: each of them may fetch a state for nothing."""

PARK_S = 60.0
"""A pause that lasts longer ends the compute process: to load a model again takes seconds, to keep it takes memory."""

FOLLOW_TRIES = 3
"""Failed attempts to catch up after which a peer that trained no longer believes who claims that head."""


class TrainingLoop:
    """One peer's way through the rounds of a run."""

    def __init__(
        self,
        manifest: RunManifest,
        view: SwarmView,
        desk: RosterDesk,
        runner: RoundRunner,
        keeper: StateKeeper,
        compute: Compute,
        on_round: Callable[[RoundRecord], None],
    ) -> None:
        self._manifest = manifest
        self._view = view
        self._desk = desk
        self._runner = runner
        self._keeper = keeper
        self._compute = compute
        self._on_round = on_round
        self._stopping = False
        self._empty_handed = False  # the last round brought nothing, so nobody is to wait for us before we have some
        self._pending = Pending(runner.exchange, manifest.round.fragments, keeper.disk.log.record)
        self._failed_follows = 0
        self._arrivals = 0  # how often we were near the head since we were last in a record
        self._troubles = 0  # in a row
        self._mended = False  # others were asked, once, for records that were damaged when the disk was opened
        self.trouble = ""
        """Why this peer takes no part now although it should; empty: it does."""
        self.paused = ""
        """Why it shall compute nothing; empty: it may."""
        self._at_head_since = time.monotonic()

    def stop(self) -> None:
        """Make `run` return after the round that is being closed, or at once if none is."""
        self._stopping = True
        self._view.notify()

    async def pause(self, reason: str) -> None:
        """Compute nothing until `resume`; what was gathered still goes into the round under way. reason: a phrase."""
        self.paused = reason
        await self._compute.hold(True)
        self._view.notify()

    async def resume(self) -> None:
        """End a pause."""
        self.paused = ""
        await self._compute.hold(False)
        self._view.notify()

    async def run(self) -> None:
        """Train until the run's last round is committed, or until `stop`."""
        self._at_head_since = time.monotonic()
        while not self._stopping:
            try:
                if await self._step():
                    return
                self.trouble, self._troubles = "", 0
            except StateError as error:  # our disk: nothing is committed that it does not hold
                if str(error) != self.trouble:
                    log.error("this peer takes no part until this is mended: %s", error)
                self.trouble = str(error)
                self._troubles += 1
                await self._compute.abandon()
                await self._rest(pause_s=min(MEND_S, RETRY_S * 2 ** min(self._troubles - 1, 10)))
            finally:
                self._pending.settle(self._keeper.head)

    async def _step(self) -> bool:
        """Do what is next; True when the run is complete."""
        last, statuses = self._manifest.round.rounds, self._view.statuses()
        if statuses and not self._mended:
            self._mended = True
            await self._keeper.mend(sorted(statuses))
        turned_away = self._view.is_turned_away()
        match plan.next_step(self._own(), last, statuses, turned_away=turned_away, paused=bool(self.paused)):
            case plan.Step.PAUSE:
                await self._pause()
            case plan.Step.WAIT_FOR_ROOM:
                await self._wait_for_room()
            case plan.Step.FOLLOW:
                await self._follow()
            case plan.Step.SEE_OFF:
                return await self._see_off()
            case plan.Step.TRAIN:
                await self._train()
        return False

    async def _pause(self) -> None:
        """Rest, and let the others know that they need not wait for us."""
        log.info("pausing: %s", self.paused)
        await self._compute.abandon()
        self._view.say(phase="paused", samples=0, tokens_per_s=0.0)
        while not await self._view.wait_until(self._may_go_on, PARK_S):
            await self._compute.park()

    def _may_go_on(self) -> bool:
        return self._stopping or not self.paused

    async def _wait_for_room(self) -> None:
        log.warning("the swarm is full; waiting until it has room for this peer")
        self._view.say(phase="joining", samples=0)
        await self._view.wait_until(lambda: self._stopping or not self._view.is_turned_away(), ROOM_S)

    async def _follow(self) -> None:
        """Catch up with the swarm; who claims a branch and cannot show it is doubted.

        A peer that trained doubts who failed it FOLLOW_TRIES times. One at round 0 has nothing to go on with and
        would start the run anew, so it goes on trying unless what it was given is refuted.
        """
        statuses = self._view.statuses()
        branch = plan.branch_to_follow(self._own(), statuses)
        if branch is None:
            await self._rest()  # we have no state, and nobody is there to have it from
            return
        own = self._keeper.head
        log.info("catching up from round %d to %d", own[0], branch.head[0])
        arriving = self._compute.ready and plan.may_arrive(self._own(), branch, self._arrivals)
        self._arrivals += plan.is_near(self._own(), branch)
        self._view.say(phase="arriving" if arriving else "joining", samples=0)
        donors = plan.donors(branch, statuses)
        others = [peer for peer, status in statuses.items() if status.total and peer not in donors]
        if await self._keeper.follow(branch, donors, others):
            self._failed_follows = 0
            self._at_head_since = time.monotonic()
            reached = self._keeper.branch
            if reached.head[0] > branch.head[0]:
                # Whoever served more than it had last said is where we are now, or ahead.
                self._view.presume_commit(donors, reached.head[0] - 1)
            self._view.say(branch=reached)
            return
        self._failed_follows += 1
        if own[0] > 0 and self._failed_follows >= FOLLOW_TRIES:
            self._failed_follows = 0
            self._view.doubt(donors)
        elif self._keeper.refuted:
            self._view.doubt(self._keeper.refuted)
        await self._rest("joining")

    async def _see_off(self) -> bool:
        """The run is complete: stay until every living peer has the last round, for a bounded time.

        False if it turns out that ours is not the swarm's last round.
        """
        own = self._keeper.branch
        self._view.say(branch=own, phase="done", samples=0)
        await self._view.wait_until(
            lambda: self._over() or all(status.head == own.head for status in self._view.statuses().values()),
            FAREWELL_S,
        )
        return self._stopping or not self._is_behind()

    async def _train(self) -> None:
        """One round: inner steps on the state at our head, their update into the swarm's next record, and its step.

        It ends without a record if the swarm has gone on without us.
        """
        begin = time.monotonic()
        await self._collect()
        if self._stopping or ((self._is_behind() or self.paused) and not self._compute.samples):
            await self._compute.abandon()
            return
        fresh = await self._compute.finish(go_on=self._manifest.round.overlap and not self.paused)
        collected = time.monotonic()
        head = self._keeper.head
        if self._is_behind():
            self._pending.keep(head, fresh)
            return
        offered = await self._pending.offer(head, fresh, self._runner.pack)
        self._empty_handed = offered is None
        if offered is None:
            await self._rest()
            return
        result = await self._runner.run(offered)
        seconds = await self._commit(result.record) if result.record else {}
        if result.included:
            self._arrivals = 0
        if result.record is None:
            log.info("round %d is not ours: %s", head[0] + 1, result.reason)
            return
        await self._report(result.record, result, {"compute": collected - begin, **result.seconds, **seconds})

    async def _collect(self) -> None:
        """Gather samples until the swarm has enough of them, or the deadline passes and we have some."""
        branch, section = self._keeper.branch, self._manifest.round
        head = branch.head
        self._view.say(branch=branch, phase=self._phase(0), samples=self._pending.samples(head, 0))
        while not self._over() and not self.paused and self._present(head) < section.min_peers:
            await self._view.wait_change(1.0)
        await self._compute.begin(head[0])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + section.deadline_s
        while not self._over():
            samples = self._pending.samples(head, self._compute.samples)
            phase, old = self._phase(samples), self._view.own
            if (samples, phase) != (old.samples, old.phase):
                self._view.say(phase=phase, samples=samples, at_once=phase != old.phase)
            gathered = plan.gathered(head, self._view.with_own())
            if plan.worth_telling(samples - self._view.told, self._present(head), gathered, section.samples):
                self._view.announce()
            left = deadline - loop.time()
            if plan.is_collected(
                samples,
                gathered,
                section.samples,
                deadline_passed=left <= 0,
                others_are_over=self._desk.others_are_over(),
                paused=bool(self.paused),
                alone=self._present(head) == 1,
            ):
                return
            await self._view.wait_change(min(1.0, left) if left > 0 else 1.0)

    def _phase(self, samples: int) -> Phase:
        """Whether others shall wait for us: not while the worker is down, or brought nothing last time."""
        able = self._compute.ready and (samples > 0 or not self._empty_handed)
        return "collecting" if able else "starting"

    def _present(self, head: Head) -> int:
        """Peers that take part in the round after `head`, ourselves included."""
        return 1 + len(plan.taking_part(head, self._view.statuses()))

    def _over(self) -> bool:
        return self._stopping or self._is_behind()

    def _own(self) -> Branch | None:
        return self._keeper.branch if self._keeper.has_state else None

    def _is_behind(self) -> bool:
        return plan.branch_to_follow(self._own(), self._view.statuses()) is not None

    async def _rest(self, phase: Phase = "starting", pause_s: float = RETRY_S) -> None:
        """The worker, the disk or others may need a moment; nobody is to wait for us meanwhile."""
        self._view.say(phase=phase, samples=0)
        # Not until the next change: others' statuses change many times a second.
        paused = self.paused
        await self._view.wait_until(lambda: self._stopping or self.paused != paused, pause_s)

    async def _commit(self, record: Record) -> dict[str, float]:
        """Take the record's step; returns the seconds of its parts. Raises StateError if the disk does not take it."""
        self._view.presume_commit({*record.voters, *record.body.peers}, self._keeper.head[0])
        self._view.say(phase="commit")
        return await self._keeper.commit(record)

    async def _report(self, record: Record, result: RoundResult, seconds: dict[str, float]) -> None:
        """Announce the new head, evaluate if it is time, and hand over the record."""
        body = record.body
        self._view.say(branch=self._keeper.branch, samples=0)
        data = self._manifest.data
        begin = time.monotonic()
        due = body.round == 1 or body.round % data.validation_every == 0 or body.round == self._manifest.round.rounds
        validation_loss = await self._compute.evaluate() if due else None
        now = time.monotonic()
        seconds["validation"] = now - begin
        round_s, self._at_head_since = now - self._at_head_since, now
        self._on_round(
            round_record(
                self._manifest,
                record,
                result,
                validation_loss=validation_loss,
                own_steps=self._compute.own_steps,
                seconds=seconds,
                round_s=round_s,
            )
        )
