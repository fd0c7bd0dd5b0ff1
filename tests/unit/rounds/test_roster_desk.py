"""RosterDesk: who is taken in, how long for whom is waited, and which rosters are refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from protocol_nodes import HEAD, WAIT, Node, make_nodes, timed

from p2pllm.errors import NetworkError
from p2pllm.rounds.gathering import LEADER_GRACE_S
from p2pllm.rounds.messages import EnrolReply, Phase, Roster
from p2pllm.rounds.record import Claim, Head, sign_holding, sign_vote
from p2pllm.rounds.roster import BUSY_S, SUSPECT_WAIT_S
from p2pllm.testing import branch, head, identity_number, peer_number, virtual

A, B = b"a" * 32, b"b" * 32


async def gathered(*nodes: Node) -> list[Roster]:
    """All gather at once, and each has a roster."""
    rosters = await asyncio.gather(*(node.desk.gather(node.offer(at + 1)) for at, node in enumerate(nodes)))
    return [roster for roster in rosters if roster is not None]


@virtual
async def test_all_agree_on_one_roster_at_once() -> None:
    nodes = await make_nodes(4)
    rosters, took = await timed(gathered(*nodes))
    assert len(rosters) == 4 and len(set(rosters)) == 1
    assert set(rosters[0].claims) == {node.claim(at + 1) for at, node in enumerate(nodes)}
    assert {node.desk.leader for node in nodes} == {nodes[0].id}
    assert took < WAIT / 2


@virtual
async def test_who_does_not_enrol_is_waited_for_and_left_behind() -> None:
    leader, member, _ = await make_nodes(3)
    rosters, took = await timed(gathered(leader, member))
    assert set(rosters[0].members) == {leader.id, member.id}
    assert WAIT < took < WAIT + 0.5


@virtual
async def test_a_leader_that_acknowledges_and_goes_silent_is_passed_over() -> None:
    leader, second, third = await make_nodes(3)
    rosters, took = await timed(gathered(second, third))
    assert set(rosters[0].members) == {second.id, third.id} == set(rosters[1].members)
    assert second.desk.leader == second.id
    assert took < WAIT + LEADER_GRACE_S + 1.0
    assert leader.desk._now.enrolments.keys() == {second.id, third.id}


@virtual
async def test_the_next_attempt_hardly_waits_for_who_failed_the_last_one() -> None:
    """Nor is it asked to lead, though it is first in the order and seems to live."""
    silent, *others = await make_nodes(3)
    gathering = [node.desk.gather(node.offer(), suspects=frozenset({silent.id})) for node in others]
    rosters, took = await timed(asyncio.gather(*gathering))
    assert all(roster is not None and set(roster.members) == {node.id for node in others} for roster in rosters)
    assert SUSPECT_WAIT_S < took < SUSPECT_WAIT_S + 0.5
    assert not silent.desk._now.enrolments


@virtual
async def test_who_failed_the_last_attempt_and_is_there_is_taken_in() -> None:
    *others, last = await make_nodes(3)
    gathering = [node.desk.gather(node.offer(), suspects=frozenset({last.id})) for node in others]
    rosters = await asyncio.gather(*gathering, last.desk.gather(last.offer()))
    assert all(roster is not None and len(roster.members) == 3 for roster in rosters)


@virtual
async def test_nobody_goes_on_alone_beside_a_living_peer_before_the_wait_has_passed() -> None:
    first, second = await make_nodes(2)
    first.host.calls.clear()  # it lives but does not answer this
    (roster,), took = await timed(gathered(second))
    assert roster.members == (second.id,)
    assert took > WAIT
    _, took = await timed(first.desk.gather(first.offer(), left_out=frozenset({second.id})))
    assert took > WAIT


@virtual
async def test_a_leader_that_is_not_there_yet_is_asked_again() -> None:
    leader, second = await make_nodes(2)
    leader.view.say(branch=branch(2, 9), phase="vote")
    second.hear(leader.id)
    leading = asyncio.create_task(second.desk.gather(second.offer()))
    await asyncio.sleep(1.0)
    leader.view.say(branch=branch(*HEAD), phase="roster")
    (roster,) = await gathered(leader)
    assert roster == await leading
    assert len(roster.members) == 2


@virtual
async def test_who_was_not_taken_in_is_taken_in_next() -> None:
    leader, second, third = await make_nodes(3)
    leader.living.discard(third.id)
    late = asyncio.create_task(third.desk.gather(third.offer(3)))
    first, _ = await gathered(leader, second)
    assert third.id not in first.members
    leader.living.add(third.id)
    again, _ = await gathered(leader, second)
    assert set(again.members) == {leader.id, second.id, third.id}
    assert await late == again


@virtual
async def test_an_enrolment_with_two_leaders_counts_for_one_attempt() -> None:
    leader, second, third = nodes = await make_nodes(3)
    await third.host.call(second.id, "enrol", third.enrol(), 1.0)  # it did not know of the leader then
    await gathered(*nodes)
    for node in (second, third):
        node.living.discard(leader.id)
    closing = asyncio.create_task(second.desk.gather(second.offer(2)))
    await asyncio.sleep(0.5)
    assert not closing.done(), "closed with a member that does not know of this attempt"
    (roster,) = await gathered(third)
    assert roster == await closing
    assert set(roster.members) == {second.id, third.id}


@virtual
async def test_nobody_goes_on_alone_beside_an_exchange() -> None:
    leader, second = await make_nodes(2)
    second.hear(leader.id, phase="exchange")  # with somebody else, who stalls it
    (roster,), took = await timed(gathered(second))
    assert roster.members == (second.id,)
    assert took > WAIT + BUSY_S


@virtual
async def test_there_is_no_round_when_the_swarm_has_moved_on() -> None:
    leader, second, third = await make_nodes(3)
    waiting = asyncio.create_task(third.desk.gather(third.offer()))
    await asyncio.sleep(0.5)
    for node in (leader, second):
        third.hear(node.id, round_=4, digest=2)
    assert await waiting is None


# -- what was voted for before ---------------------------------------------------------------------------------------


@virtual
async def test_what_members_voted_for_before_is_what_the_roster_settles() -> None:
    leader, second, third = await make_nodes(3)
    offers = [(leader, leader.offer()), (second, second.offer(holding=A)), (third, third.offer(holding=A))]
    rosters = await asyncio.gather(*(node.desk.gather(offer) for node, offer in offers))
    assert len(set(rosters)) == 1 and rosters[0] is not None
    assert rosters[0].proposal == A
    assert set(rosters[0].holding) == {second.id, third.id}
    assert rosters[0].is_signed


@virtual
async def test_what_failed_for_the_leader_is_settled_no_more() -> None:
    leader, second = await make_nodes(2)
    offers = [(leader, leader.offer(failed=frozenset({A}))), (second, second.offer(holding=A))]
    roster, _ = await asyncio.gather(*(node.desk.gather(offer) for node, offer in offers))
    assert roster is not None
    assert (roster.proposal, roster.holders) == (b"", ())


# -- what is refused -------------------------------------------------------------------------------------------------


@virtual
async def test_enrolments_from_another_head_are_not_taken() -> None:
    node, other = await make_nodes(2)
    cases: list[tuple[Phase, Head]] = [("roster", head(2, 1)), ("done", HEAD), ("starting", HEAD)]
    for phase, there in cases:
        node.view.say(phase=phase)
        reply = await other.host.call(node.id, "enrol", other.enrol(where=there), 1.0)
        assert not EnrolReply.unpack(reply).accepted
    assert other.id not in node.desk._now.enrolments


@pytest.mark.parametrize("flaw", ["of another peer", "for another round", "changed"])
@virtual
async def test_an_enrolment_with_a_claim_that_its_sender_did_not_sign_is_refused(flaw: str) -> None:
    node, other, third = await make_nodes(3)
    claim = {
        "of another peer": third.claim(),
        "for another round": other.claim(where=head(2, 1)),
        "changed": other.claim().model_copy(update={"samples": 10**9}),
    }[flaw]
    with pytest.raises(NetworkError, match="not signed by who sent it"):
        await other.host.call(node.id, "enrol", other.enrol(claim), 1.0)
    assert other.id not in node.desk._now.enrolments
    await other.host.call(node.id, "enrol", other.enrol(), 1.0)
    assert other.id in node.desk._now.enrolments


@virtual
async def test_who_says_that_it_holds_something_signs_that_for_this_round() -> None:
    node, other, third = await make_nodes(3)
    for wrong in (
        sign_holding(third.identity, HEAD, A),
        sign_holding(other.identity, head(2, 1), A),
        sign_vote(other.identity, A),
    ):
        with pytest.raises(NetworkError, match="not signed by who sent it"):
            await other.host.call(node.id, "enrol", other.enrol(holding=A, proof=wrong), 1.0)
    right = sign_holding(other.identity, HEAD, A)
    await other.host.call(node.id, "enrol", other.enrol(holding=A, proof=right), 1.0)
    assert node.desk._now.enrolments[other.id].holding == A


@pytest.mark.parametrize(
    "flaw",
    [
        "",
        "stranger",
        "samples",
        "head",
        "without",
        "of another head",
        "forged",
        "framed",
        "old holding",
        "a vote",
        "bytes",
    ],
)
@virtual
async def test_a_roster_that_is_not_ours_is_refused(flaw: str) -> None:
    leader, member, other = await make_nodes(3)
    gathering = asyncio.create_task(member.desk.gather(member.offer(5)))
    await asyncio.sleep(0.1)
    mine, theirs = member.claim(5), leader.claim(1)
    flaws: dict[str, dict[str, Any]] = {
        "samples": {"claims": (theirs, mine.model_copy(update={"samples": 6}))},
        "head": {"round": 4},
        "without": {"claims": (theirs, other.claim(1))},
        "of another head": {"claims": (leader.claim(1, head(2, 1)), mine)},
        "forged": {"claims": (theirs.model_copy(update={"samples": 10**9}), mine)},
        # The member holds nothing. What it once held, or voted for, others have seen.
        "framed": {"proposal": A, "holders": ((1, sign_holding(leader.identity, HEAD, A)),)},
        "old holding": {"proposal": A, "holders": ((1, sign_holding(member.identity, head(2, 1), A)),)},
        "a vote": {"proposal": A, "holders": ((1, sign_vote(member.identity, A)),)},
    }
    fields = {"round": 3, "digest": HEAD[1], "claims": (theirs, mine), "proposal": b"", "holders": ()}
    payload = b"\xff" if flaw == "bytes" else Roster(nonce=bytes(16), **{**fields, **flaws.get(flaw, {})}).pack()
    sender = other if flaw == "stranger" else leader
    if flaw:
        with pytest.raises(NetworkError):
            await sender.host.call(member.id, "roster", payload, 1.0)
        assert not gathering.done()
        gathering.cancel()
    else:
        await sender.host.call(member.id, "roster", payload, 1.0)
        assert (await gathering) == Roster.unpack(payload)


@virtual
async def test_enrolments_are_bounded() -> None:
    node, other = await make_nodes(2)
    for number in range(100, 356):
        claim = Claim.sign(identity_number(number), HEAD, 1, 1.0, B)
        await node.desk._on_enrol(peer_number(number), other.enrol(claim))
    with pytest.raises(NetworkError, match="too many"):
        await other.host.call(node.id, "enrol", other.enrol(), 1.0)
