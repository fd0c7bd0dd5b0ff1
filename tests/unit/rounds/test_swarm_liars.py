"""Members that lie, in whole swarms in memory: a round takes longer, but the run goes on."""

from __future__ import annotations

import pytest

from p2pllm.averaging import ExchangeResult, Group
from p2pllm.averaging.dense import NOTICE_METHOD
from p2pllm.rounds.messages import Roster
from p2pllm.testing import MemorySwarm, virtual


@virtual
async def test_a_claim_that_nobody_can_show_stops_nobody() -> None:
    swarm = MemorySwarm(rounds=30)
    honest, liar = swarm.add(2)
    await swarm.start(honest)
    await swarm.until(lambda: honest.keeper.head[0] == 2)
    await liar.membership.start([honest.host.address])  # it beats, and serves nothing
    liar.view.say(head=(20, bytes(31) + b"x"), phase="collecting")
    await swarm.until(lambda: honest.keeper.head[0] >= 5, 20.0)


@virtual
async def test_at_round_0_a_refuted_claim_stops_nobody() -> None:
    swarm = MemorySwarm(rounds=30)
    honest, liar = swarm.add(2)
    liar.keeper.head = (20, bytes(31) + b"x")  # it serves its state of round 0 instead
    await swarm.start()
    assert liar.task is not None
    liar.task.cancel()
    swarm.gone.add(liar)
    liar.view.say(head=liar.keeper.head, phase="collecting")
    await swarm.until(lambda: honest.keeper.head[0] >= 3, 30.0)


@pytest.mark.parametrize("count", [2, 3, 5])
@virtual
async def test_a_member_that_never_votes_stops_nobody(count: int) -> None:
    swarm = MemorySwarm(rounds=4)
    peers = swarm.add(count)
    mute = peers[0]
    mute.votes._send = lambda *_: None
    await swarm.start()
    await swarm.finish(600.0)


@pytest.mark.parametrize("count", [2, 3, 5])
@virtual
async def test_a_member_that_votes_for_nonsense_stops_nobody(count: int) -> None:
    swarm = MemorySwarm(rounds=4)
    peers = swarm.add(count)
    liar = peers[0]
    settle = liar.votes.settle

    async def lie(group: bytes, members: tuple[str, ...], aggregate: bytes, timeout: float):
        return await settle(group, members, bytes(32), timeout)

    liar.votes.settle = lie
    await swarm.start()
    honest = peers[1:]
    await swarm.until(lambda: all(peer.keeper.head[0] == 4 for peer in honest), 600.0)
    await swarm.until(lambda: len({peer.keeper.head for peer in honest}) == 1)


@pytest.mark.parametrize("lie", ["replay", "different"])
@virtual
async def test_a_leader_that_lies_is_passed_over(lie: str) -> None:
    swarm = MemorySwarm(rounds=20)  # enough for the liar to lead one
    peers = swarm.add(4)
    liar = peers[0]
    sent: list[bytes] = []

    async def tell(peer: str, payload: bytes) -> None:
        roster = Roster.unpack(payload)
        sent.append(payload)
        if lie == "different":
            payload = roster.model_copy(update={"nonce": peer[-16:].encode()}).pack()
        elif Roster.unpack(sent[0]).head == roster.head:
            payload = sent[0]
        await liar.host.call(peer, "roster", payload, 2.0)

    liar.desk._tell = tell
    await swarm.start()
    await swarm.finish(600.0)
    assert sent


@pytest.mark.parametrize("count", [2, 3, 4])
@virtual
async def test_a_member_that_always_gives_up_and_accuses_stops_nobody(count: int) -> None:
    swarm = MemorySwarm(rounds=3)
    peers = swarm.add(count)
    liar = peers[0]

    async def accuse(group: Group, vector: object, deadline: float) -> ExchangeResult:
        mask = sum(1 << index for index, member in enumerate(group.members) if member == peers[1].id)
        notice = group.group_id + group.digest(64) + mask.to_bytes(32, "little")
        for member in group.members:
            if member != liar.id:
                await liar.host.call(member, NOTICE_METHOD, notice, 1.0)
        return ExchangeResult(None, frozenset(), "I do not like it.", 0, 0)

    liar.allreduce.run = accuse
    await swarm.start()
    honest = peers[1:]
    await swarm.until(lambda: all(peer.keeper.head[0] == 3 for peer in honest), 600.0)
    await swarm.until(lambda: len({peer.keeper.head for peer in honest}) == 1)
