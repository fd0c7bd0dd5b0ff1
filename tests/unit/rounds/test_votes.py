"""VoteBox: which votes count, and how long it waits for those that are missing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from protocol_nodes import HEAD, RUN, Node, make_nodes, timed

from p2pllm.errors import NetworkError
from p2pllm.rounds import plan
from p2pllm.rounds.chain import check_votes
from p2pllm.rounds.messages import Vote
from p2pllm.rounds.record import Body, sign_vote
from p2pllm.rounds.vote import MAX_EARLY, MAX_EARLY_PEERS
from p2pllm.testing import peer_number, virtual

GROUP, A, B = b"g" * 32, b"a" * 32, b"b" * 32
COMMIT_A = plan.Decision(plan.Verdict.COMMIT, A)


def names(*nodes: Node) -> tuple[str, ...]:
    return tuple(node.id for node in nodes)


@virtual
async def test_votes_meet_and_commit() -> None:
    nodes = await make_nodes(3)
    held = [A, A, b""]
    work = (node.votes.settle(GROUP, names(*nodes), body, 8.0) for node, body in zip(nodes, held, strict=True))
    outcomes, took = await timed(asyncio.gather(*work))
    assert {decision for decision, _ in outcomes} == {COMMIT_A}
    assert took < 0.1


@virtual
async def test_the_votes_for_a_body_make_its_record() -> None:
    nodes = await make_nodes(3)
    body = Body(
        run=bytes.fromhex(RUN),
        round=HEAD[0] + 1,
        previous=HEAD[1],
        total=48,
        members=tuple(node.claim() for node in nodes),
        aggregate=A,
        state=B,
    )
    held = [body.digest, body.digest, A]
    work = (node.votes.settle(GROUP, names(*nodes), digest, 8.0) for node, digest in zip(nodes, held, strict=True))
    for decision, ballot in await asyncio.gather(*work):
        assert decision == plan.Decision(plan.Verdict.COMMIT, body.digest)
        assert set(ballot.holders(body.digest)) == {nodes[0].id, nodes[1].id}
        record = ballot.record(body)
        check_votes(record)
        assert set(record.voters) == {nodes[0].id, nodes[1].id}
        assert record.has_majority


@virtual
async def test_an_early_vote_counts() -> None:
    first, second = await make_nodes(2)
    early = asyncio.create_task(first.votes.settle(GROUP, names(first, second), A, 8.0))
    await asyncio.sleep(1.0)
    decision, _ = await second.votes.settle(GROUP, names(first, second), A, 8.0)
    assert decision == COMMIT_A
    assert (await early)[0] == decision


@virtual
async def test_a_frozen_member_delays_no_decision_of_the_others() -> None:
    first, second, frozen = await make_nodes(3)
    frozen.host.freeze()
    members = names(first, second, frozen)
    outcomes, took = await timed(asyncio.gather(*(n.votes.settle(GROUP, members, A, 8.0) for n in (first, second))))
    assert all(decision == COMMIT_A for decision, _ in outcomes)
    assert took < 0.1


@pytest.mark.parametrize("how", ["dead", "hung", "silent", "gone"])
@virtual
async def test_of_two_a_missing_vote_is_waited_for_within_bounds(how: str) -> None:
    first, second = await make_nodes(2)
    if how == "dead":
        second.host.kill()
    elif how == "hung":
        second.host.freeze()
    elif how == "gone":
        asyncio.get_running_loop().call_later(1.0, first.living.clear)
        asyncio.get_running_loop().call_later(1.0, first.view.notify)
    (decision, ballot), took = await timed(first.votes.settle(GROUP, names(first, second), A, 8.0))
    assert decision.verdict is plan.Verdict.RETRY
    assert ballot.votes == {first.id: A}
    assert took <= {"dead": 0.1, "hung": 2.1, "gone": 1.1, "silent": 8.1}[how]


@virtual
async def test_the_first_vote_stands_and_strangers_have_none() -> None:
    first, second, stranger = await make_nodes(3)
    settling = asyncio.create_task(first.votes.settle(GROUP, names(first, second), A, 8.0))
    await asyncio.sleep(0.1)
    await stranger.host.call(first.id, "vote", stranger.vote(GROUP, A), 1.0)
    await second.host.call(first.id, "vote", second.vote(GROUP, B), 1.0)
    await second.host.call(first.id, "vote", second.vote(GROUP, A), 1.0)
    decision, ballot = await settling
    assert decision.verdict is plan.Verdict.RETRY
    assert ballot.votes == {first.id: A, second.id: B}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("flaw", ["of another peer", "for another body"])
@virtual
async def test_a_vote_that_its_sender_did_not_sign_counts_for_nothing(flaw: str, early: bool) -> None:
    first, second, third = await make_nodes(3)
    signature = sign_vote(third.identity, A) if flaw == "of another peer" else sign_vote(second.identity, B)
    forged = Vote(group=GROUP, body=A, signature=signature).pack()
    settling: Any = first.votes.settle(GROUP, names(first, second), A, 8.0)
    if early:
        await second.host.call(first.id, "vote", forged, 1.0)
        settling = asyncio.create_task(settling)
        await asyncio.sleep(0.1)
    else:
        settling = asyncio.create_task(settling)
        await asyncio.sleep(0.1)
        with pytest.raises(NetworkError, match="not signed by who sent it"):
            await second.host.call(first.id, "vote", forged, 1.0)
    assert not settling.done()
    await second.host.call(first.id, "vote", second.vote(GROUP, A), 1.0)
    assert (await settling)[0] == COMMIT_A, "the forged one must not stand in the place of its own"


@virtual
async def test_a_flood_of_votes_pushes_out_nobody_elses() -> None:
    first, second, flooder = await make_nodes(3)
    await second.host.call(first.id, "vote", second.vote(GROUP, A), 1.0)
    signature = bytes(64)
    for number in range(1000):
        vote = Vote(group=number.to_bytes(32, "big"), body=A, signature=signature)
        await flooder.host.call(first.id, "vote", vote.pack(), 1.0)
    assert len(first.votes._early[flooder.id]) == MAX_EARLY
    decision, _ = await first.votes.settle(GROUP, names(first, second), A, 8.0)
    assert decision == COMMIT_A
    for number in range(1000):
        await first.votes._on_vote(peer_number(number), Vote(group=B, body=A, signature=signature).pack())
    assert len(first.votes._early) <= MAX_EARLY_PEERS
