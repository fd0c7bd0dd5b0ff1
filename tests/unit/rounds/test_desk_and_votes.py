"""RosterDesk, VoteBox and SwarmView one by one: what they take from others, and how long they wait."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from p2pllm.errors import NetworkError
from p2pllm.rounds import plan
from p2pllm.rounds.messages import Enrol, EnrolReply, Roster, Vote
from p2pllm.rounds.roster import BUSY_S, LEADER_GRACE_S, RosterDesk
from p2pllm.rounds.swarm import DOUBT_S, MAX_HEARD, SwarmView
from p2pllm.rounds.vote import MAX_EARLY, MAX_EARLY_PEERS, VoteBox
from p2pllm.testing import MemoryNetwork, head, make_manifest, peer_number, status, virtual

GROUP, A, B = b"g" * 32, b"a" * 32, b"b" * 32
HEAD = head(3, 1)
WAIT = 2.0


class Node:
    """One peer with a desk and a vote box; the test says who lives and what they are."""

    def __init__(self, network: MemoryNetwork, number: int) -> None:
        self.host = network.host(number)
        self.id = self.host.peer_id
        self.living: set[str] = set()
        self.view = SwarmView(self.id, initial_state=bytes(32), last_round=100)
        self.view.attach(
            SimpleNamespace(alive=lambda: frozenset(self.living), push=lambda: None, is_turned_away=lambda: False)
        )
        self.view.say(head=HEAD, phase="roster")
        section = make_manifest(roster_wait_s=WAIT).round
        self.desk = RosterDesk(self.host, self.view, section, "run", asyncio.get_running_loop().time)
        self.votes = VoteBox(self.host, self.view)

    def hear(self, peer: str, **fields) -> None:
        self.living.add(peer)
        self.view.hear(peer, status(**{"round_": 3, "digest": 1, "phase": "roster", **fields}).pack())


async def make_nodes(count: int) -> list[Node]:
    """All know each other, in the order in which they lead."""
    network = MemoryNetwork()
    nodes = [Node(network, number) for number in range(count)]
    for node in nodes:
        await node.desk.start()
        await node.votes.start()
        for other in nodes:
            if other is not node:
                node.hear(other.id)
    order = plan.ranked("run", HEAD, [node.id for node in nodes])
    return sorted(nodes, key=lambda node: order.index(node.id))


async def timed(work):
    clock = asyncio.get_running_loop().time
    begin = clock()
    return await work, clock() - begin


# -- rosters -----------------------------------------------------------------------------------------------------


@virtual
async def test_all_agree_on_one_roster_at_once():
    nodes = await make_nodes(4)
    rosters, took = await timed(asyncio.gather(*(node.desk.gather(n + 1, 1.0) for n, node in enumerate(nodes))))
    assert len(set(rosters)) == 1
    assert dict(zip(rosters[0].members, rosters[0].samples, strict=True)) == {
        node.id: n + 1 for n, node in enumerate(nodes)
    }
    assert {node.desk.leader for node in nodes} == {nodes[0].id}
    assert took < WAIT / 2


@virtual
async def test_who_does_not_enrol_is_waited_for_and_left_behind():
    leader, member, _ = await make_nodes(3)
    rosters, took = await timed(asyncio.gather(leader.desk.gather(1, 1.0), member.desk.gather(1, 1.0)))
    assert set(rosters[0].members) == {leader.id, member.id}
    assert WAIT < took < WAIT + 0.5


@virtual
async def test_a_leader_that_acknowledges_and_goes_silent_is_passed_over():
    leader, second, third = await make_nodes(3)
    rosters, took = await timed(asyncio.gather(second.desk.gather(1, 1.0), third.desk.gather(1, 1.0)))
    assert set(rosters[0].members) == {second.id, third.id} == set(rosters[1].members)
    assert second.desk.leader == second.id
    assert took < WAIT + LEADER_GRACE_S + 1.0
    assert leader.desk._now.enrolments.keys() == {second.id, third.id}


@virtual
async def test_nobody_goes_on_alone_beside_a_living_peer_before_the_wait_has_passed():
    first, second = await make_nodes(2)
    first.host.calls.clear()  # it lives but does not answer this
    roster, took = await timed(second.desk.gather(1, 1.0))
    assert roster.members == (second.id,)
    assert took > WAIT
    _, took = await timed(first.desk.gather(1, 1.0, left_out=frozenset({second.id})))
    assert took > WAIT


@virtual
async def test_a_leader_that_is_not_there_yet_is_asked_again():
    leader, second = await make_nodes(2)
    leader.view.say(head=head(2, 9), phase="vote")
    second.hear(leader.id, phase="roster")
    leading = asyncio.create_task(second.desk.gather(1, 1.0))
    await asyncio.sleep(1.0)
    leader.view.say(head=HEAD, phase="roster")
    roster, other = await asyncio.gather(leader.desk.gather(1, 1.0), leading)
    assert roster == other
    assert len(roster.members) == 2


@virtual
async def test_who_was_not_taken_in_is_taken_in_next():
    leader, second, third = await make_nodes(3)
    leader.living.discard(third.id)
    late = asyncio.create_task(third.desk.gather(3, 1.0))
    first, _ = await asyncio.gather(leader.desk.gather(1, 1.0), second.desk.gather(2, 1.0))
    assert third.id not in first.members
    leader.living.add(third.id)
    again, _ = await asyncio.gather(leader.desk.gather(1, 1.0), second.desk.gather(2, 1.0))
    assert set(again.members) == {leader.id, second.id, third.id}
    assert await late == again


@virtual
async def test_an_enrolment_with_two_leaders_counts_for_one_attempt():
    leader, second, third = nodes = await make_nodes(3)
    enrol = Enrol(round=HEAD[0], digest=HEAD[1], samples=3, loss=1.0)
    await third.host.call(second.id, "enrol", enrol.pack(), 1.0)  # it did not know of the leader then
    await asyncio.gather(*(node.desk.gather(n + 1, 1.0) for n, node in enumerate(nodes)))
    for node in (second, third):
        node.living.discard(leader.id)
    closing = asyncio.create_task(second.desk.gather(2, 1.0))
    await asyncio.sleep(0.5)
    assert not closing.done(), "closed with a member that does not know of this attempt"
    roster = await third.desk.gather(3, 1.0)
    assert roster == await closing
    assert set(roster.members) == {second.id, third.id}


@virtual
async def test_nobody_goes_on_alone_beside_an_exchange():
    leader, second = await make_nodes(2)
    second.hear(leader.id, phase="exchange")  # with somebody else, who stalls it
    roster, took = await timed(second.desk.gather(1, 1.0))
    assert roster.members == (second.id,)
    assert took > WAIT + BUSY_S


@virtual
async def test_there_is_no_round_when_the_swarm_has_moved_on():
    leader, second, third = await make_nodes(3)
    waiting = asyncio.create_task(third.desk.gather(1, 1.0))
    await asyncio.sleep(0.5)
    for node in (leader, second):
        third.hear(node.id, round_=4, digest=2)
    assert await waiting is None


@virtual
async def test_enrolments_from_another_head_are_refused():
    node, other = await make_nodes(2)
    for own, phase, there in [(HEAD, "roster", head(2, 1)), (HEAD, "done", HEAD), (HEAD, "starting", HEAD)]:
        node.view.say(head=own, phase=phase)
        enrol = Enrol(round=there[0], digest=there[1], samples=1, loss=1.0)
        reply = EnrolReply.unpack(await other.host.call(node.id, "enrol", enrol.pack(), 1.0))
        assert not reply.accepted
    assert other.id not in node.desk._now.enrolments


@pytest.mark.parametrize("flaw", ["stranger", "samples", "head", "without", "bytes"])
@virtual
async def test_a_roster_that_is_not_ours_is_refused(flaw: str):
    leader, member, other = await make_nodes(3)
    gathering = asyncio.create_task(member.desk.gather(5, 1.0))
    await asyncio.sleep(0.1)
    fields = {"round": 3, "digest": HEAD[1], "members": (leader.id, member.id), "samples": (1, 5)}
    fields |= {"samples": {"samples": (1, 6)}, "head": {"round": 4}, "without": {"members": (leader.id, other.id)}}.get(
        flaw, {}
    )
    payload = Roster(nonce=bytes(16), losses=(1.0, 1.0), **fields).pack()
    sender = other if flaw == "stranger" else leader
    with pytest.raises(NetworkError):
        await sender.host.call(member.id, "roster", b"\xff" if flaw == "bytes" else payload, 1.0)
    assert not gathering.done()
    gathering.cancel()


@virtual
async def test_enrolments_are_bounded():
    node, other = await make_nodes(2)
    enrol = Enrol(round=3, digest=HEAD[1], samples=1, loss=1.0).pack()
    for number in range(256):
        await node.desk._on_enrol(peer_number(number + 100), enrol)
    with pytest.raises(NetworkError):
        await other.host.call(node.id, "enrol", enrol, 1.0)


# -- votes -------------------------------------------------------------------------------------------------------


@virtual
async def test_votes_meet_and_commit():
    nodes = await make_nodes(3)
    members = tuple(node.id for node in nodes)
    held = [A, A, b""]
    outcomes, took = await timed(
        asyncio.gather(*(node.votes.settle(GROUP, members, h, 8.0) for node, h in zip(nodes, held, strict=True)))
    )
    assert {decision for decision, _ in outcomes} == {plan.Decision(plan.Verdict.COMMIT, A)}
    assert took < 0.1


@virtual
async def test_an_early_vote_counts():
    first, second = await make_nodes(2)
    members = (first.id, second.id)
    early = asyncio.create_task(first.votes.settle(GROUP, members, A, 8.0))
    await asyncio.sleep(1.0)
    decision, _ = await second.votes.settle(GROUP, members, A, 8.0)
    assert decision.verdict is plan.Verdict.COMMIT
    assert (await early)[0] == decision


@virtual
async def test_a_frozen_member_delays_no_decision_of_the_others():
    first, second, frozen = await make_nodes(3)
    frozen.host.freeze()
    members = (first.id, second.id, frozen.id)
    outcomes, took = await timed(asyncio.gather(*(n.votes.settle(GROUP, members, A, 8.0) for n in (first, second))))
    assert all(decision.aggregate == A for decision, _ in outcomes)
    assert took < 0.1


@pytest.mark.parametrize("how", ["dead", "hung", "silent", "gone"])
@virtual
async def test_of_two_a_missing_vote_is_waited_for_within_bounds(how: str):
    first, second = await make_nodes(2)
    if how == "dead":
        second.host.kill()
    elif how == "hung":
        second.host.freeze()
    elif how == "gone":
        asyncio.get_running_loop().call_later(1.0, first.living.clear)
        asyncio.get_running_loop().call_later(1.0, first.view.notify)
    (decision, votes), took = await timed(first.votes.settle(GROUP, (first.id, second.id), A, 8.0))
    assert decision.verdict is plan.Verdict.RETRY
    assert votes == {first.id: A}
    assert took <= {"dead": 0.1, "hung": 2.1, "gone": 1.1, "silent": 8.1}[how]


@virtual
async def test_the_first_vote_stands_and_strangers_have_none():
    first, second, stranger = await make_nodes(3)
    settling = asyncio.create_task(first.votes.settle(GROUP, (first.id, second.id), A, 8.0))
    await asyncio.sleep(0.1)
    await stranger.host.call(first.id, "vote", Vote(group=GROUP, aggregate=A).pack(), 1.0)
    await second.host.call(first.id, "vote", Vote(group=GROUP, aggregate=B).pack(), 1.0)
    decision, votes = await settling
    assert decision.verdict is plan.Verdict.RETRY
    assert votes == {first.id: A, second.id: B}


@virtual
async def test_a_flood_of_votes_pushes_out_nobody_elses():
    first, second, flooder = await make_nodes(3)
    await second.host.call(first.id, "vote", Vote(group=GROUP, aggregate=A).pack(), 1.0)
    for number in range(1000):
        vote = Vote(group=number.to_bytes(32, "big"), aggregate=A)
        await flooder.host.call(first.id, "vote", vote.pack(), 1.0)
    assert len(first.votes._early[flooder.id]) == MAX_EARLY
    decision, _ = await first.votes.settle(GROUP, (first.id, second.id), A, 8.0)
    assert decision.verdict is plan.Verdict.COMMIT
    for number in range(1000):
        await first.votes._on_vote(peer_number(number), Vote(group=B, aggregate=A).pack())
    assert len(first.votes._early) <= MAX_EARLY_PEERS


# -- the view ----------------------------------------------------------------------------------------------------


@virtual
async def test_the_view_shows_the_living_and_is_bounded():
    node, other = await make_nodes(2)
    for number in range(2000):
        node.view.hear(f"stranger-{number}", status(3, 1).pack())
    assert len(node.view._heard) <= MAX_HEARD + 1
    assert node.view.statuses().keys() == {other.id}


@virtual
async def test_claims_that_cannot_be_count_for_nothing():
    node, other = await make_nodes(2)
    node.hear(other.id, round_=101)
    assert node.view.statuses()[other.id].phase == "joining"
    node.hear(other.id, round_=0, digest=5)
    assert node.view.statuses()[other.id].phase == "joining"
    node.view.hear(other.id, b"nonsense")
    assert other.id in node.view.statuses()


@virtual
async def test_who_is_doubted_counts_again_after_a_while():
    node, other = await make_nodes(2)
    node.hear(other.id, round_=9)
    node.view.doubt([other.id])
    assert plan.head_to_follow(HEAD, node.view.statuses()) is None
    await asyncio.sleep(DOUBT_S + 1)
    assert plan.head_to_follow(HEAD, node.view.statuses()) == head(9, 1)


@virtual
async def test_waiting_ends_with_a_change_or_in_time():
    node, _ = await make_nodes(2)
    asyncio.get_running_loop().call_later(1.0, node.view.notify)
    assert (await timed(node.view.wait_change(5.0)))[1] == pytest.approx(1.0, abs=0.01)
    assert (await timed(node.view.wait_until(lambda: False, 2.0)))[0] is False
