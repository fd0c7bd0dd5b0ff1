"""Members that lie, in whole swarms in memory: a round takes longer, but the run goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from histories import changed, claims_of, gradient, record_of

from p2pllm.averaging import ExchangeResult, Group
from p2pllm.averaging.dense import NOTICE_METHOD
from p2pllm.network.bulk import Blob, BulkServer
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.gathering import LEADER_GRACE_S, Offer
from p2pllm.rounds.messages import Roster
from p2pllm.rounds.record import Body, Record, pack_all, peer_of, sign_holding
from p2pllm.rounds.round import MAX_STRIKES, VOTE_FLOOR_S
from p2pllm.rounds.vote import Ballot
from p2pllm.state.chunks import digest_of
from p2pllm.testing import MemoryPeer, MemorySwarm, virtual


def held(liar: MemoryPeer, offer: Offer, body: bytes) -> Offer:
    """The offer, and that the liar holds this body."""
    return dataclasses.replace(offer, holding=body, proof=sign_holding(liar.identity, liar.keeper.head, body))


async def claim(liar: MemoryPeer, branch: Branch, *, serve: Any = None) -> None:
    """The liar beats and says that it holds `branch`; it trains nothing, and serves what `serve` says."""
    await liar.membership.start([host.address for host in liar.swarm.network.first(2) if host is not liar.host])
    if serve is not None:
        await BulkServer(liar.host, serve).start()
    liar.view.say(branch=branch, phase="collecting")
    liar.swarm.gone.add(liar)


def invented(liar: MemoryPeer, base: tuple[int, bytes], total: int, samples: int, count: int) -> list[Record]:
    """Right records of the liar alone, with states and aggregates that are none."""
    records: list[Record] = []
    for _ in range(count):
        body = Body(
            run=bytes.fromhex(liar.keeper.run_id),
            round=base[0] + 1,
            previous=base[1],
            total=total + samples,
            members=claims_of(base, liar.number, samples=samples),
            aggregate=bytes(32),
            state=bytes(32),
        )
        records.append(record_of(body, liar.number))
        base, total = body.head, body.total
    return records


# -- claims to a branch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@virtual
async def test_a_claim_that_nobody_can_show_stops_nobody(count: int) -> None:
    """It serves nothing at all. However many samples it claims, it moves nobody, and delays within bounds."""
    swarm = MemorySwarm(rounds=10**6)
    *honest, liar = swarm.add(count + 1)
    await swarm.start(*honest)
    await swarm.until(lambda: all(peer.keeper.head[0] >= 3 for peer in honest))
    kept = honest[0].disk.head_at(3)
    await claim(liar, Branch((20, bytes(31) + b"x"), 10**18, 10**6))
    await swarm.until(lambda: all(peer.keeper.head[0] >= 8 for peer in honest), 40.0)
    assert all(peer.disk.log.has(kept) and not peer.disk.log.abandoned() for peer in honest)
    swarm.check_states()


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("what", ["nothing", "invented records", "a forged vote", "its own light branch"])
@virtual
async def test_a_claim_that_is_shown_to_be_wrong_stops_nobody(what: str, rounds: int) -> None:
    swarm = MemorySwarm(rounds=10**6)
    *honest, liar = swarm.add(4)
    await swarm.start(*honest)
    await swarm.until(lambda: all(peer.keeper.head[0] >= rounds for peer in honest))
    records = invented(liar, liar.keeper.head, 0, 10**9, 5)
    if what == "a forged vote":
        records[2] = Record(body=records[2].body, votes=records[1].votes)
    if what == "its own light branch":
        records = invented(liar, liar.keeper.head, 0, 1, 2)

    async def serve(request: dict[str, Any]) -> Blob | None:
        if request["what"] != "log":
            return None
        shown = [] if what == "nothing" else [record.pack() for record in records]
        return Blob({"base": list(liar.keeper.head), "checkpoints": []}, [pack_all(shown)])

    await claim(liar, Branch((20, bytes(31) + b"x"), 10**12, 0), serve=serve)
    since = honest[0].keeper.head[0]
    await swarm.until(lambda: all(peer.keeper.head[0] >= since + 5 for peer in honest), 60.0)
    assert not any(peer.disk.log.has(records[0].head) for peer in honest)
    swarm.check_states()
    swarm.check_rounds()


@virtual
async def test_a_state_that_two_keys_of_a_liar_vote_for_stops_nobody() -> None:
    """Keys cost nothing; its record links and adds up, its aggregate is there, but its state is made up."""
    swarm = MemorySwarm(rounds=10**6)
    *honest, liar = swarm.add(3)
    await swarm.start(*honest)
    await swarm.until(lambda: all(peer.keeper.head[0] >= 3 for peer in honest))
    first = honest[0].disk.log.record(1)
    assert first is not None
    claims = claims_of(first.body.base, liar.number, 77, samples=10**9)
    total = sum(each.samples for each in claims)
    lie = record_of(changed(first.body, members=claims, total=total, state=bytes(32)), liar.number, 77)

    async def serve(request: dict[str, Any]) -> Blob | None:
        if request["what"] == "log":
            return Blob({"base": list(first.body.base), "checkpoints": []}, [pack_all([lie.pack()])])
        return await honest[0].keeper.serve(request)

    await claim(liar, Branch(lie.head, lie.body.total, 0), serve=serve)
    since = honest[0].keeper.head[0]
    await swarm.until(lambda: all(peer.keeper.head[0] >= since + 5 for peer in honest), 60.0)
    swarm.check_states()


@virtual
async def test_at_round_0_a_refuted_claim_stops_nobody() -> None:
    swarm = MemorySwarm(rounds=30)
    honest, liar = swarm.add(2)
    await claim(liar, Branch((20, bytes(31) + b"x"), 10**6, 0), serve=liar.keeper.serve)  # it has round 0 alone
    await swarm.start(honest)
    await swarm.until(lambda: honest.keeper.head[0] >= 3, 30.0)


# -- rosters and votes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
@virtual
async def test_a_member_that_never_votes_stops_nobody(count: int) -> None:
    swarm = MemorySwarm(rounds=4)
    peers = swarm.add(count)
    mute = peers[0]
    mute.votes._send = lambda *_: None  # type: ignore[method-assign]
    await swarm.start()
    await swarm.finish(600.0)


@pytest.mark.parametrize("lie", ["for nothing that is", "forged"])
@pytest.mark.parametrize("count", [2, 3, 5])
@virtual
async def test_a_member_that_votes_for_nonsense_stops_nobody(count: int, lie: str) -> None:
    swarm = MemorySwarm(rounds=4)
    peers = swarm.add(count)
    liar = peers[0]
    settle, send = liar.votes.settle, liar.votes._send

    async def nonsense(group: bytes, members: tuple[str, ...], body: bytes, timeout: float) -> tuple[Any, Ballot]:
        return await settle(group, members, bytes(32), timeout)

    if lie == "forged":
        liar.votes._send = lambda peer, vote, failed: send(  # type: ignore[method-assign]
            peer, vote.model_copy(update={"signature": bytes(64)} if vote.body else {}), failed
        )
    else:
        liar.votes.settle = nonsense  # type: ignore[method-assign]
    await swarm.start()
    honest = peers[1:]
    await swarm.until(lambda: all(peer.keeper.head[0] == 4 for peer in honest), 600.0)
    await swarm.until(lambda: len({peer.keeper.head for peer in honest}) == 1)


@pytest.mark.parametrize(
    "lie", ["replay", "different", "forged claim", "made-up proposal", "an old proposal", "a mean of its own"]
)
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
        elif lie == "forged claim":
            claims = [
                each.model_copy(update={"samples": 10**9}) if each.peer != peer else each for each in roster.claims
            ]
            payload = roster.model_copy(update={"claims": tuple(claims)}).pack()
        elif lie == "made-up proposal":
            holder = roster.members.index(liar.id)
            holders = ((holder, sign_holding(liar.identity, roster.head, bytes(32))),)
            payload = roster.model_copy(update={"proposal": bytes(32), "holders": holders}).pack()
        elif lie == "a mean of its own":  # of what everybody claims, with the right state after it
            body = await liar.keeper.propose(roster.claims, gradient(99))
            holders = ((roster.members.index(liar.id), sign_holding(liar.identity, roster.head, body.digest)),)
            payload = roster.model_copy(update={"proposal": body.digest, "holders": holders}).pack()
        elif lie == "an old proposal":  # with the votes for it of those who are to look like liars
            old = liar.disk.log.record(liar.keeper.head[0])
            votes = {peer_of(key): vote for key, vote in old.votes} if old else {}
            holders = tuple((at, votes[each]) for at, each in enumerate(roster.members) if each in votes)
            if old is not None and holders:
                payload = roster.model_copy(update={"proposal": old.body.digest, "holders": holders}).pack()
        elif Roster.unpack(sent[0]).head == roster.head:
            payload = sent[0]
        await liar.host.call(peer, "roster", payload, 2.0)

    liar.desk._tell = tell  # type: ignore[method-assign]
    await swarm.start()
    await swarm.finish(600.0)
    assert sent
    for peer in peers:
        assert all(record.samples < 10**6 for record in peer.records)
        assert digest_of(gradient(99).data.cast("B")).hex() not in {record.aggregate_digest for record in peer.records}
    if lie == "an old proposal":
        swarm.check_rounds()
        assert all(len(record.members) >= 3 for record in peers[1].records), "nobody goes on alone"


@pytest.mark.parametrize("count", [2, 3, 4])
@virtual
async def test_a_member_that_says_it_holds_what_is_not_there_stops_nobody(count: int) -> None:
    """In every enrolment it claims to have voted for a body before; with it, nothing would be exchanged."""
    swarm = MemorySwarm(rounds=6)
    peers = swarm.add(count)
    liar = peers[0]
    gather = liar.desk.gather

    async def lie(offer: Offer, *peers: frozenset[str]) -> Roster | None:
        return await gather(held(liar, offer, b"made up " * 4), *peers)

    liar.desk.gather = lie  # type: ignore[method-assign, assignment]
    await swarm.start()
    honest = peers[1:]
    await swarm.until(lambda: all(peer.keeper.head[0] == 6 for peer in honest), 600.0)
    if len(honest) > 1:  # else both are half of the swarm, and each goes on alone
        swarm.check_rounds()


@pytest.mark.parametrize("count", [3, 5])
@virtual
async def test_a_member_that_invents_a_proposal_for_each_attempt_is_named_and_left_out(count: int) -> None:
    """Whatever it says that it holds is another body each time, which it gives; their aggregates are junk."""
    swarm = MemorySwarm(rounds=4)
    *honest, liar = swarm.add(count)
    gather, junk = liar.desk.gather, b"junk" * 10
    liar.disk.aggregates.put(digest_of(junk), junk)
    made: list[Body] = []

    async def lie(offer: Offer, *peers: frozenset[str]) -> Roster | None:
        branch, run = liar.keeper.branch, bytes.fromhex(liar.keeper.run_id)
        if branch.head[0] != 2:
            return await gather(offer, *peers)
        members = claims_of(branch.head, liar.number)
        total, state = branch.total + members[0].samples, len(made).to_bytes(32, "big")
        body = Body(
            run=run, round=3, previous=branch.head[1], total=total, members=members, aggregate=digest_of(junk),
            state=state,
        )  # fmt: skip
        made.append(body)
        liar.keeper._held[body.digest] = body
        return await gather(held(liar, offer, body.digest), *peers)

    liar.desk.gather = lie  # type: ignore[method-assign, assignment]
    await swarm.start()
    await swarm.until(lambda: all(peer.keeper.head[0] == 4 for peer in honest))
    assert len({body.digest for body in made}) >= MAX_STRIKES
    for peer in honest:
        third = peer.records[2]
        assert third.round == 3 and 1 < third.attempts <= MAX_STRIKES + 1
        assert third.members.keys() == {other.id for other in honest}, "the honest go on together"
        assert sum(f"The proposal of {liar.id} is refused" in why for why in third.failures) == third.attempts - 1
        took = peer.committed_at[3] - peer.committed_at[2]
        assert took < 2 * (swarm.manifest.round.roster_wait_s + LEADER_GRACE_S + VOTE_FLOOR_S)
    swarm.check_rounds()


@pytest.mark.parametrize("count", [3, 4])
@virtual
async def test_a_member_that_holds_a_proposal_of_itself_alone_decides_nothing(count: int) -> None:
    """Its body is right in all else: a claim of its own, an aggregate of its own, and the state that follows."""
    swarm = MemorySwarm(rounds=5)
    *honest, liar = swarm.add(count)
    gather = liar.desk.gather
    made: list[Body] = []

    async def lie(offer: Offer, *peers: frozenset[str]) -> Roster | None:
        made.append(await liar.keeper.propose((offer.claim,), gradient(len(made))))
        return await gather(held(liar, offer, made[-1].digest), *peers)

    liar.desk.gather = lie  # type: ignore[method-assign, assignment]
    await swarm.start()
    await swarm.until(lambda: all(peer.keeper.head[0] == 5 for peer in honest), 600.0)
    assert made
    for peer in honest:
        for record in peer.records[1:]:
            assert record.members.keys() >= {other.id for other in honest}
    swarm.check_rounds()


@virtual
async def test_a_founder_that_holds_a_proposal_of_itself_alone_does_not_keep_newcomers_out() -> None:
    swarm = MemorySwarm(rounds=6)
    liar, *honest = swarm.add(4)
    gather = liar.desk.gather

    async def lie(offer: Offer, *peers: frozenset[str]) -> Roster | None:
        made = await liar.keeper.propose((offer.claim,), gradient(liar.keeper.head[0]))
        return await gather(held(liar, offer, made.digest), *peers)

    await swarm.start(liar)
    await swarm.until(lambda: liar.keeper.head[0] >= 1)
    liar.desk.gather = lie  # type: ignore[method-assign, assignment]
    await swarm.start(*honest)
    await swarm.until(lambda: all(peer.keeper.head[0] == 6 for peer in honest), 600.0)
    assert honest[0].records[-1].members.keys() >= {peer.id for peer in honest}


@virtual
async def test_a_proposal_with_claims_that_were_not_signed_is_committed_by_nobody() -> None:
    """The liar says that it holds a body, and it does: one with samples that the others never claimed."""
    swarm = MemorySwarm(rounds=6)
    peers = swarm.add(3)
    liar, *honest = peers
    propose = liar.keeper.propose
    made: list[Body] = []

    async def invent(claims: tuple[Any, ...], aggregate: np.ndarray) -> Body:
        forged = tuple(each.model_copy(update={"samples": 10**9}) if each.peer != liar.id else each for each in claims)
        made.append(await propose(forged, aggregate))
        return made[-1]

    liar.keeper.propose = invent  # type: ignore[method-assign]
    await swarm.start()
    await swarm.until(lambda: all(peer.keeper.head[0] == 6 for peer in honest), 600.0)
    assert made
    for peer in honest:
        assert peer.keeper.branch.total < 10**6
        assert not any(peer.disk.log.has(body.head) for body in made)


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

    liar.exchange.run = accuse
    await swarm.start()
    honest = peers[1:]
    await swarm.until(lambda: all(peer.keeper.head[0] == 3 for peer in honest), 600.0)
    await swarm.until(lambda: len({peer.keeper.head for peer in honest}) == 1)
