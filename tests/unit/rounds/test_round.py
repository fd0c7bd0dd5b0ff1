"""RoundRunner alone: whatever the exchange does, a result; the same update in every attempt; who fails is left out."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from p2pllm.averaging import ExchangeResult, Group
from p2pllm.errors import StateError
from p2pllm.rounds import plan
from p2pllm.rounds.fetching import Refuted
from p2pllm.rounds.gathering import Offer
from p2pllm.rounds.messages import Roster
from p2pllm.rounds.record import Body, Claim, Record, sign_vote
from p2pllm.rounds.round import MAX_STRIKES, RoundResult, RoundRunner
from p2pllm.rounds.update import Update, joined
from p2pllm.rounds.vote import Ballot
from p2pllm.state.chunks import digest_of
from p2pllm.testing import LAYOUT, head, identity_number, make_manifest, virtual

KEYS = [identity_number(number) for number in range(3)]
ME, B, C = (key.peer_id for key in KEYS)
VECTOR = np.ones(LAYOUT.size, np.float32)
OTHER = np.zeros(LAYOUT.size, np.float32)
UPDATE = Update(4, 1.0, VECTOR)
HEAD = head(3, 1)
RUN = "5a" * 32
NOBODY: frozenset[str] = frozenset()


def claim(number: int) -> Claim:
    return Claim.sign(KEYS[number], HEAD, 4, 1.0, digest_of(VECTOR.data.cast("B")))


def body_of(claims: tuple[Claim, ...], aggregate: np.ndarray = VECTOR) -> Body:
    """What everybody makes of these claims and this aggregate."""
    return Body(
        run=bytes.fromhex(RUN),
        round=HEAD[0] + 1,
        previous=HEAD[1],
        total=100,
        members=claims,
        aggregate=digest_of(aggregate.data.cast("B")),
        state=digest_of(aggregate.data.cast("B")),
    )


CLAIMS = tuple(claim(number) for number in range(3))
BODY, OTHER_BODY = body_of(CLAIMS), body_of(CLAIMS, OTHER)
NO = plan.Decision(plan.Verdict.RETRY)
YES = plan.Decision(plan.Verdict.COMMIT, BODY.digest)


class Fakes:
    """All that a runner talks to; the test scripts the outcome of each attempt."""

    def __init__(self, members: tuple[str, ...] = (ME, B, C), attempts: int = 100) -> None:
        self.peer_id, self.layout, self.leader, self.run_id, self.head = ME, LAYOUT, B, RUN, HEAD
        self.members, self.left = members, attempts
        self.holding = b""
        self.proposal = b""  # that the leader puts into the rosters
        self.asked: list[tuple[frozenset[str], frozenset[str]]] = []
        self.suspected: list[frozenset[str]] = []
        self.offers: list[Offer] = []
        self.vectors: list[np.ndarray] = []
        self.phases: list[str] = []
        self.cast: list[bytes] = []  # what we voted
        self.exchange: ExchangeResult | Exception = ExchangeResult(VECTOR, NOBODY, "", 5, 7)
        self.trouble: StateError | None = None  # of our disk, when it proposes
        self.decisions = [YES]
        self.votes: dict[str, bytes] = {B: BODY.digest, C: BODY.digest}
        self.fetched: Body | None = None
        self.refuted = ""
        self.forgotten: list[bytes] = []
        self.fetched_from: list[tuple[list[str], bytes]] = []
        self.checks = 0

    def say(self, phase: str, at_once: bool = True) -> None:
        self.phases.append(phase)

    async def gather(
        self, offer: Offer, left_out: frozenset[str], not_leading: frozenset[str], suspects: frozenset[str]
    ) -> Roster | None:
        self.offers.append(offer)
        self.asked.append((left_out, not_leading))
        self.suspected.append(suspects)
        if len(self.asked) > self.left:
            return None
        claims = tuple(each for each in CLAIMS if each.peer in self.members and each.peer not in left_out)
        proposal = self.proposal if self.proposal not in offer.failed else b""
        return Roster(
            round=HEAD[0],
            digest=HEAD[1],
            nonce=len(self.asked).to_bytes(16, "big"),
            claims=claims,
            proposal=proposal,
            holders=((1, bytes(64)),) if proposal else (),
        )

    def pack(self, update: np.ndarray) -> np.ndarray:
        return update

    async def run(self, group: Group, vector: np.ndarray, deadline: float) -> ExchangeResult:
        self.vectors.append(vector)
        if isinstance(self.exchange, Exception):
            raise self.exchange
        return self.exchange

    async def settle(
        self, group: bytes, members: tuple[str, ...], body: bytes, timeout: float
    ) -> tuple[plan.Decision, Ballot]:
        self.cast.append(body)
        decision = self.decisions.pop(0) if len(self.decisions) > 1 else self.decisions[0]
        votes = {ME: body, **self.votes}
        signatures = {key.peer_id: sign_vote(key, votes[key.peer_id]) for key in KEYS if key.peer_id in votes}
        return decision, Ballot(members, votes, signatures)

    async def propose(self, claims: tuple[Claim, ...], aggregate: np.ndarray) -> Body:
        if self.trouble is not None:
            raise self.trouble
        return body_of(claims, aggregate)

    async def fetch_proposal(self, peers: list[str], digest: bytes, timeout: float) -> Body | None:
        self.fetched_from.append((peers, digest))
        if self.refuted:
            raise Refuted(self.refuted)
        return self.fetched

    async def check(self) -> bool:
        self.checks += 1
        return True

    def forget(self, digest: bytes) -> None:
        self.forgotten.append(digest)

    async def run_once(self) -> RoundResult:
        """Bring UPDATE into the round."""
        me = cast(Any, self)
        runner = RoundRunner(KEYS[0], me, me, me, me, me, make_manifest().round)
        return await runner.run(await runner.pack(UPDATE))


@virtual
async def test_an_agreed_body_is_the_result() -> None:
    fakes = Fakes()
    result = await fakes.run_once()
    assert result.record is not None and result.record.body == BODY
    assert set(result.record.voters) == {ME, B, C}
    assert result.included
    assert (result.attempts, result.reason, result.bytes_sent, result.bytes_received) == (1, "", 5, 7)
    assert fakes.phases == ["roster", "exchange", "vote"]
    assert fakes.offers[0].claim == claim(0)
    assert fakes.fetched_from == []


@virtual
async def test_a_failed_attempt_is_made_again_with_the_same_update() -> None:
    fakes = Fakes()
    fakes.decisions = [NO, NO, NO, YES]
    result = await fakes.run_once()
    assert result.record is not None
    assert result.attempts == 4
    assert all(vector is VECTOR for vector in fakes.vectors)
    assert {offer.claim for offer in fakes.offers} == {claim(0)}, "another claim would be another body"


@virtual
async def test_only_a_moved_head_ends_the_attempts() -> None:
    fakes = Fakes(attempts=20)
    fakes.decisions = [NO]
    result = await fakes.run_once()
    assert result.record is None and not result.included
    assert result.attempts == 21
    assert "without us" in result.reason


@virtual
async def test_who_fails_again_is_left_out_and_who_led_leads_no_more() -> None:
    fakes = Fakes()
    fakes.exchange = ExchangeResult(None, frozenset({C}), "C is silent.", 0, 0)
    fakes.decisions = [NO] * MAX_STRIKES + [YES]
    fakes.fetched = BODY
    fakes.votes = {B: BODY.digest, C: b""}
    result = await fakes.run_once()
    assert result.record is not None
    assert result.failures == ["C is silent."] * (MAX_STRIKES + 1), "also that of the attempt that the others committed"
    assert fakes.asked == [(NOBODY, NOBODY)] * MAX_STRIKES + [(frozenset({C}), frozenset({B}))]
    assert fakes.suspected == [NOBODY] + [frozenset({C})] * MAX_STRIKES


@virtual
async def test_a_roster_that_cannot_be_used_is_a_failed_attempt() -> None:
    fakes = Fakes()
    fakes.exchange = ValueError("This group was run before.")
    fakes.decisions = [NO, YES]
    fakes.fetched = BODY
    result = await fakes.run_once()
    assert result.record is not None
    assert result.attempts == 2
    assert fakes.cast == [b"", b""], "who has no aggregate says so"


@virtual
async def test_a_disk_that_does_not_take_the_aggregate_is_a_vote_for_nothing() -> None:
    fakes = Fakes(attempts=1)
    fakes.trouble = StateError("The disk is full.")
    fakes.decisions = [NO]
    result = await fakes.run_once()
    assert fakes.cast == [b""]
    assert result.record is None


@virtual
async def test_what_others_agreed_on_is_fetched_from_who_voted_for_it() -> None:
    fakes = Fakes()
    fakes.votes = {B: OTHER_BODY.digest, C: OTHER_BODY.digest}
    fakes.decisions = [plan.Decision(plan.Verdict.COMMIT, OTHER_BODY.digest)]
    fakes.fetched = OTHER_BODY
    result = await fakes.run_once()
    assert result.record is not None and result.record.body == OTHER_BODY
    assert fakes.fetched_from == [([B, C], OTHER_BODY.digest)]
    assert set(result.record.voters) == {B, C}


@virtual
async def test_a_body_that_cannot_be_fetched_is_tried_again_until_the_swarm_has_moved() -> None:
    fakes = Fakes(attempts=3)
    fakes.votes = {B: OTHER_BODY.digest, C: OTHER_BODY.digest}
    fakes.decisions = [plan.Decision(plan.Verdict.COMMIT, OTHER_BODY.digest)]
    result = await fakes.run_once()
    assert result.record is None
    assert result.attempts == 4


@virtual
async def test_a_record_may_be_without_our_update() -> None:
    fakes = Fakes()
    without = body_of(CLAIMS[1:], OTHER)
    fakes.votes = {B: without.digest, C: without.digest}
    fakes.decisions = [plan.Decision(plan.Verdict.COMMIT, without.digest)]
    fakes.fetched = without
    result = await fakes.run_once()
    assert result.record is not None
    assert not result.included


@pytest.mark.parametrize("others", [BODY.digest, OTHER_BODY.digest])
@virtual
async def test_our_state_is_checked_when_somebody_comes_to_another_one(others: bytes) -> None:
    fakes = Fakes()
    fakes.decisions = [NO, YES]
    fakes.votes = {B: others}
    await fakes.run_once()
    assert fakes.checks == (others != BODY.digest)


# -- a proposal of an attempt before ---------------------------------------------------------------------------------


@virtual
async def test_what_is_held_is_offered_and_a_proposal_is_settled_without_an_exchange() -> None:
    fakes, others = Fakes(), body_of(CLAIMS[1:], OTHER)
    fakes.holding = fakes.proposal = others.digest
    fakes.votes = {B: others.digest}
    fakes.decisions = [plan.Decision(plan.Verdict.COMMIT, others.digest)]
    fakes.fetched = others
    result = await fakes.run_once()
    assert fakes.offers[0].holding == others.digest
    assert fakes.fetched_from == [([B], others.digest)]
    assert fakes.cast == [others.digest]
    assert fakes.vectors == [], "nothing is exchanged"
    assert result.record == Record.of(others, {key.peer_id: sign_vote(key, others.digest) for key in KEYS[:2]})


@pytest.mark.parametrize("exchanged", [True, False])
@virtual
async def test_a_proposal_with_our_update_is_of_an_exchange_that_we_were_in(exchanged: bool) -> None:
    fakes = Fakes()
    fakes.fetched = OTHER_BODY
    fakes.votes = {B: OTHER_BODY.digest, C: b""}
    fakes.decisions = [NO, plan.Decision(plan.Verdict.COMMIT, OTHER_BODY.digest)]
    gather = fakes.gather

    async def proposing(*asked: Any) -> Roster | None:
        fakes.proposal = OTHER_BODY.digest if fakes.asked or not exchanged else b""
        return await gather(*asked)

    fakes.gather = proposing  # type: ignore[method-assign, assignment]
    fakes.exchange = ExchangeResult(None, NOBODY, "It broke here.", 0, 0)
    await fakes.run_once()
    assert fakes.cast == ([b"", OTHER_BODY.digest] if exchanged else [b"", b""])


@virtual
async def test_a_proposal_that_fails_twice_is_dropped() -> None:
    fakes = Fakes()
    fakes.proposal = OTHER_BODY.digest
    fakes.decisions = [NO] * MAX_STRIKES + [YES]
    fakes.votes = {B: b"", C: b""}
    result = await fakes.run_once()
    assert fakes.cast == [b""] * MAX_STRIKES + [BODY.digest]
    assert fakes.offers[-1].failed == {OTHER_BODY.digest}
    assert result.attempts == MAX_STRIKES + 1
    assert len(fakes.vectors) == 1


@virtual
async def test_who_holds_what_cannot_be_used_is_left_out_whatever_it_holds_next() -> None:
    fakes = Fakes()
    why, without = "The proposal of B is refused.", body_of((CLAIMS[0], CLAIMS[2]))
    fakes.decisions = [NO] * MAX_STRIKES + [plan.Decision(plan.Verdict.COMMIT, without.digest)]
    fakes.votes = {C: b""}
    gather = fakes.gather

    async def another_each_time(*asked: Any) -> Roster | None:
        fakes.proposal = len(fakes.asked).to_bytes(32, "big") if B not in asked[1] else b""
        fakes.refuted = why if fakes.proposal else ""
        return await gather(*asked)

    fakes.gather = another_each_time  # type: ignore[method-assign, assignment]
    result = await fakes.run_once()
    assert result.failures == [why] * MAX_STRIKES
    assert fakes.asked[-1][0] == {B}
    assert len(fakes.vectors) == 1, "the next attempt exchanges"


@virtual
async def test_a_proposal_without_most_of_the_roster_is_not_voted_for_and_speaks_against_who_holds_it() -> None:
    fakes = Fakes()
    alone = fakes.fetched = body_of(CLAIMS[1:2], OTHER)
    fakes.proposal = alone.digest
    without = body_of((CLAIMS[0], CLAIMS[2]))
    fakes.decisions = [NO] * MAX_STRIKES + [plan.Decision(plan.Verdict.COMMIT, without.digest)]
    fakes.votes = {C: b""}
    result = await fakes.run_once()
    assert fakes.cast[:MAX_STRIKES] == [b""] * MAX_STRIKES
    assert fakes.forgotten == [alone.digest] * MAX_STRIKES
    assert fakes.asked[-1][0] == {B}
    assert f"The proposal of {B} is refused: it is without half of the roster." in result.failures


@virtual
async def test_alone_there_is_nobody_to_blame() -> None:
    fakes = Fakes(members=(ME,))
    fakes.exchange = ValueError("The vector does not fit.")
    fakes.decisions = [NO]
    result = await fakes.run_once()
    assert result.record is None
    assert result.attempts == 1


# -- updates of more than one round ----------------------------------------------------------------------------------


def test_a_pending_update_and_a_fresh_one_are_one_by_their_samples() -> None:
    fresh = Update(12, 3.0, 5 * VECTOR)
    both = joined(UPDATE, fresh)
    assert both is not None
    assert (both.samples, both.loss) == (16, 2.5)
    np.testing.assert_allclose(both.vector, 4 * VECTOR)
    assert not np.shares_memory(both.vector, fresh.vector)
    assert joined(None, fresh) is fresh
    assert joined(UPDATE, None) is UPDATE
    assert joined(None, None) is None


def test_a_kept_update_is_not_touched_by_the_next_one() -> None:
    shared = VECTOR.copy()
    kept = Update(4, 1.0, shared).kept()
    shared[:] = 7.0
    np.testing.assert_array_equal(kept.vector, VECTOR)
