"""Faults by script: they strike in the phase and round that was asked for, whatever it is, and are undone in time."""

from __future__ import annotations

import asyncio

import pytest

from p2pllm.testing import SLOW_S, MemoryPeer, MemorySwarm, virtual

PHASES = ["collecting", "roster", "exchange", "vote", "commit"]


def struck(peer: MemoryPeer, how: str) -> bool:
    """Whether it suffers from that fault now."""
    host = peer.host
    return {"kill": host.dead, "freeze": host.frozen, "cut": host.cut_off, "slow": host.extra_s == SLOW_S}[how]


@pytest.mark.parametrize("how", ["kill", "freeze", "cut", "slow"])
@pytest.mark.parametrize("phase", PHASES)
@virtual
async def test_it_strikes_in_that_phase_of_that_round(phase: str, how: str) -> None:
    swarm = MemorySwarm(rounds=20)
    victim, other, _ = swarm.add(3)
    clock, entered = asyncio.get_running_loop().time, {}
    victim.view.watchers.append(lambda status: entered.setdefault((status.round, status.phase), clock()))
    swarm.fail_at(peer=0, round=2, phase=phase, how=how)
    await swarm.start()
    while not struck(victim, how):  # noqa: ASYNC110 - virtual time
        await asyncio.sleep(0.0002)
    assert 0 <= clock() - entered[2, phase] < 0.0005
    assert not struck(other, how)
    await swarm.until(lambda: other.keeper.head[0] >= 4)


@virtual
async def test_it_strikes_after_the_delay_and_once() -> None:
    swarm = MemorySwarm(rounds=10)
    victim, _ = swarm.add(2)
    struck_at, entered_at = [], []
    clock = asyncio.get_running_loop().time
    victim.at("exchange", 1, lambda: entered_at.append(clock()))
    victim.at("exchange", 1, lambda: struck_at.append(clock()), delay=0.05)
    await swarm.start()
    await swarm.finish()
    assert struck_at == pytest.approx([entered_at[0] + 0.05])
    assert not victim.view.watchers


@pytest.mark.parametrize("how", ["freeze", "cut", "slow"])
@virtual
async def test_it_is_undone_in_time(how: str) -> None:
    swarm = MemorySwarm(rounds=10**6)
    victim, *_ = swarm.add(3)
    swarm.fail_at(peer=0, round=1, phase="exchange", how=how, for_s=2.0)
    await swarm.start()
    await swarm.until(lambda: struck(victim, how))
    await asyncio.sleep(1.9)
    assert struck(victim, how)
    await asyncio.sleep(0.15)
    assert not struck(victim, how)
    await swarm.until(lambda: len(victim.records[-1].members) == 3)


@virtual
async def test_who_was_killed_comes_back_with_its_state() -> None:
    swarm = MemorySwarm(rounds=10**6)
    swarm.add(3)
    swarm.fail_at(peer=1, round=3, phase="vote", how="kill", for_s=2.0)
    await swarm.start()
    await swarm.until(lambda: swarm.peers[1].host.dead)
    dead = swarm.peers[1]
    digest = dead.keeper.state.digest()
    await swarm.until(lambda: swarm.peers[1] is not dead)
    again = swarm.peers[1]
    assert again.id == dead.id
    assert again.keeper.state.digest() == digest
    await swarm.until(lambda: bool(again.records) and len(again.records[-1].members) == 3)


@virtual
async def test_several_faults_at_one_peer() -> None:
    swarm = MemorySwarm(rounds=8)
    first, *_ = swarm.add(3)
    swarm.fail_at(peer=2, round=1, phase="roster", how="slow", for_s=1.0)
    swarm.fail_at(peer=2, round=1, phase="exchange", how="freeze", for_s=1.0)
    swarm.fail_at(peer=2, round=4, phase="collecting", how="kill")
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    assert swarm.peers[2].host.dead
    assert len(first.records) == 8


@virtual
async def test_a_fault_or_a_phase_that_there_is_not() -> None:
    swarm = MemorySwarm()
    swarm.add(1)
    with pytest.raises(ValueError, match="no phase 'votes'; choose one of starting, "):
        swarm.fail_at(peer=0, round=1, phase="votes", how="kill")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose kill, freeze, cut or slow"):
        swarm.fail_at(peer=0, round=1, phase="vote", how="explode")  # type: ignore[arg-type]
