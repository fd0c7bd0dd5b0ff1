"""Every fault in every phase of a round, for a leader and for an ordinary member, in swarms of 2, 3 and 5.

What must come out is the same each time: the survivors go on within the stated time, no committed record is lost
unless the network was cut, and once the victim is back all are on one branch, in the state that its records name.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import get_args

import pytest

from p2pllm.rounds import plan
from p2pllm.rounds.messages import Phase
from p2pllm.rounds.record import Head, Record
from p2pllm.testing import SLOW_S, MemoryPeer, MemorySwarm, virtual
from p2pllm.testing.faults import How

SIZES = (2, 3, 5)
FAULTS: tuple[How, ...] = get_args(How)
PHASES: tuple[Phase, ...] = ("collecting", "roster", "exchange", "vote", "commit")
SNAPSHOT = "snapshot"
"""The commit of a round after which the state is saved."""

ROUND = 4
"""The fault strikes in the round after this one; with SNAPSHOT_EVERY, round 5 is followed by no snapshot, 6 is."""
SNAPSHOT_EVERY = 6
WORK_S = 0.4
"""Of a micro-batch of 4 samples; a round has 12. Shorter rounds test the same, and take longer."""
STRUCK_S = 7.0
"""How long the fault lasts."""
LONGEST_S = {"kill": 2.0, "freeze": 6.0, "cut": 6.0, "slow": 6.0}
"""Between two commits of a survivor, beside the 3 * WORK_S that one alone works for 12 samples."""


def pick(swarm: MemorySwarm, head: Head, leads: bool) -> MemoryPeer:
    """The peer that leads the round after `head`, or one that does not."""
    first = plan.ranked(swarm.manifest.run_id, head, [peer.id for peer in swarm.peers])[0]
    return next(peer for peer in swarm.peers if (peer.id == first) is leads)


def records_of(peer: MemoryPeer) -> dict[Head, Record]:
    return {record.head: record for record in peer.disk.log.records() if record is not None}


def undo(swarm: MemorySwarm, victim: MemoryPeer, how: How) -> MemoryPeer:
    network = swarm.network
    if how == "kill":
        victim = swarm.restart(victim)
        victim.host.spawn(victim.start(), "restart")
    elif how == "freeze":
        victim.thaw()
    elif how == "cut":
        network.mend(victim.id)
    else:
        network.slow(victim.id, 0.0)
    return victim


@pytest.mark.parametrize("leads", [False, True], ids=["member", "leader"])
@pytest.mark.parametrize("phase", [*PHASES, SNAPSHOT])
@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("size", SIZES)
@virtual
async def test_every_fault_in_every_phase(size: int, how: How, phase: str, leads: bool) -> None:
    swarm = MemorySwarm(rounds=10**6, snapshot_every=SNAPSHOT_EVERY)
    for peer in swarm.add(size):
        peer.compute.step_s = WORK_S
    clock = asyncio.get_running_loop().time
    round_ = SNAPSHOT_EVERY - 1 if phase == SNAPSHOT else ROUND
    await swarm.start()
    await swarm.until(lambda: all(peer.keeper.head[0] >= round_ - 1 for peer in swarm.peers))
    await swarm.until(lambda: any(peer.keeper.head[0] == round_ for peer in swarm.peers))
    head = max(peer.keeper.head for peer in swarm.peers)
    victim = pick(swarm, head, leads)
    struck: list[float] = []
    strike = {
        "kill": victim.kill,
        "freeze": victim.freeze,
        "cut": lambda: swarm.network.cut(victim.id),
        "slow": lambda: swarm.network.slow(victim.id, SLOW_S),
    }[how]

    def act() -> None:
        strike()
        struck.append(clock())

    victim.at("commit" if phase == SNAPSHOT else phase, round_, act)  # type: ignore[arg-type]
    await swarm.until(lambda: bool(struck))
    survivors = [peer for peer in swarm.peers if peer is not victim]
    await swarm.until(lambda: clock() > struck[0] + STRUCK_S)
    held = {peer.number: records_of(peer) for peer in swarm.peers}
    for peer in survivors:
        times = [struck[0], *(at for at in peer.committed_at.values() if at > struck[0]), clock()]
        longest = max(after - before for before, after in itertools.pairwise(times))
        assert longest <= LONGEST_S[how] + 3 * WORK_S, f"peer {peer.number} stood still for {longest:.1f} s"
    victim = undo(swarm, victim, how)
    everybody = [*survivors, victim]
    then = max(peer.keeper.head[0] for peer in survivors)

    def together() -> bool:
        """All are past the fault, the victim contributes again, and their logs agree."""
        least = min(peer.keeper.head[0] for peer in everybody)
        names = {peer.disk.log.digest(least) for peer in everybody}
        newest = survivors[0].disk.log.record(least)
        return least > then + 1 and len(names) == 1 and newest is not None and victim.id in newest.body.peers

    await swarm.until(together, 120.0)
    least = min(peer.keeper.head[0] for peer in everybody)
    assert len({peer.disk.log.digest(least) for peer in everybody}) == 1
    kept = records_of(survivors[0])
    if how != "cut":
        for number, records in held.items():
            lost = sorted(head[0] for head in records.keys() - kept.keys() if head[0] <= least)
            assert not lost, f"rounds {lost} that peer {number} had committed are lost"
    for peer in everybody:
        peer.loop.stop()
    await asyncio.gather(*(peer.task for peer in everybody if peer.task is not None))
    swarm.check_states()
