"""RoundRunner alone: whatever the exchange does, a result; the same update in every attempt; who fails is left out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from p2pllm.averaging import ExchangeResult, Group
from p2pllm.rounds import plan
from p2pllm.rounds.keeper import aggregate_digest
from p2pllm.rounds.messages import Roster
from p2pllm.rounds.round import MAX_STRIKES, RoundRunner, Update
from p2pllm.testing import LAYOUT, head, make_manifest, virtual

ME, B, C = "peer-me-", "peer-b--", "peer-c--"
VECTOR = np.ones(LAYOUT.size, np.float32)
UPDATE = Update(4, 1.0, VECTOR)
NO = plan.Decision(plan.Verdict.RETRY)
YES = plan.Decision(plan.Verdict.COMMIT, aggregate_digest(VECTOR))


class Fakes:
    """All that a runner talks to; the test scripts the outcome of each attempt."""

    def __init__(self, members: tuple[str, ...] = (ME, B, C), attempts: int = 100) -> None:
        self.peer_id, self.layout, self.leader = ME, LAYOUT, B
        self.members, self.left = members, attempts
        self.asked: list[tuple[frozenset[str], frozenset[str]]] = []
        self.vectors: list[np.ndarray] = []
        self.phases: list[str] = []
        self.exchange = ExchangeResult(VECTOR, frozenset(), "", 5, 7)
        self.decisions = [YES]
        self.votes: dict[str, bytes] = {}
        self.fetched: np.ndarray | None = None

    def say(self, phase: str) -> None:
        self.phases.append(phase)

    async def gather(self, samples, loss, left_out, not_leading) -> Roster | None:
        self.asked.append((left_out, not_leading))
        if len(self.asked) > self.left:
            return None
        members = tuple(peer for peer in self.members if peer not in left_out)
        some = len(members)
        return Roster(
            round=3,
            digest=head(3, 1)[1],
            nonce=len(self.asked).to_bytes(16, "big"),
            members=members,
            samples=(4,) * some,
            losses=(1.0,) * some,
        )

    async def run(self, group: Group, vector: np.ndarray, deadline: float) -> ExchangeResult:
        self.vectors.append(vector)
        if isinstance(self.exchange, Exception):
            raise self.exchange
        return self.exchange

    async def settle(self, group, members, aggregate, timeout):
        decision = self.decisions.pop(0) if len(self.decisions) > 1 else self.decisions[0]
        return decision, {ME: aggregate, **self.votes}

    def propose(self, digest, aggregate) -> None: ...

    async def fetch_aggregate(self, holders, digest):
        self.holders = holders
        return self.fetched

    def runner(self) -> RoundRunner:
        section = make_manifest().round
        view = SimpleNamespace(peer_id=ME, say=self.say)
        return RoundRunner(view, self, self, self, self, section, "run")


@virtual
async def test_an_agreed_aggregate_is_the_result():
    fakes = Fakes()
    result = await fakes.runner().run(UPDATE)
    assert result.committed
    assert result.aggregate is VECTOR
    assert (result.attempts, result.reason, result.bytes_sent, result.bytes_received) == (1, "", 5, 7)
    assert fakes.phases == ["roster", "exchange", "vote"]


@virtual
async def test_a_failed_attempt_is_made_again_with_the_same_update():
    fakes = Fakes()
    fakes.decisions = [NO, NO, NO, YES]
    fakes.votes = {B: YES.aggregate, C: YES.aggregate}
    result = await fakes.runner().run(UPDATE)
    assert result.committed
    assert result.attempts == 4
    assert all(vector is VECTOR for vector in fakes.vectors)


@virtual
async def test_only_a_moved_head_drops_the_update():
    fakes = Fakes(attempts=20)
    fakes.decisions = [NO]
    fakes.votes = {B: YES.aggregate, C: YES.aggregate}
    result = await fakes.runner().run(UPDATE)
    assert not result.committed
    assert result.attempts == 21


@virtual
async def test_who_fails_again_is_left_out_and_who_led_leads_no_more():
    fakes = Fakes()
    fakes.exchange = ExchangeResult(None, frozenset({C}), "C is silent.", 0, 0)
    fakes.decisions = [NO] * MAX_STRIKES + [YES]
    fakes.fetched = VECTOR
    fakes.votes = {B: b"", C: b""}
    assert (await fakes.runner().run(UPDATE)).committed
    none: frozenset[str] = frozenset()
    assert fakes.asked == [(none, none)] * MAX_STRIKES + [(frozenset({C}), frozenset({B}))]


@virtual
async def test_a_roster_that_cannot_be_used_is_a_failed_attempt():
    fakes = Fakes()
    fakes.exchange = ValueError("This group was run before.")
    fakes.decisions = [NO, YES]
    fakes.fetched = VECTOR
    result = await fakes.runner().run(UPDATE)
    assert result.committed
    assert result.attempts == 2


@virtual
async def test_what_others_agreed_on_is_fetched_from_who_holds_it():
    fakes = Fakes()
    other = np.zeros(LAYOUT.size, np.float32)
    fakes.votes = {B: aggregate_digest(other), C: aggregate_digest(other)}
    fakes.decisions = [plan.Decision(plan.Verdict.COMMIT, aggregate_digest(other))]
    fakes.fetched = other
    result = await fakes.runner().run(UPDATE)
    assert result.aggregate is other
    assert fakes.holders == [B, C]


@virtual
async def test_an_aggregate_that_cannot_be_fetched_is_tried_again_until_the_swarm_has_moved():
    fakes = Fakes(attempts=3)
    fakes.votes = {B: bytes(32), C: bytes(32)}
    fakes.decisions = [plan.Decision(plan.Verdict.COMMIT, bytes(32))]
    result = await fakes.runner().run(UPDATE)
    assert not result.committed
    assert result.attempts == 4


@virtual
async def test_alone_there_is_nobody_to_blame():
    fakes = Fakes(members=(ME,))
    fakes.exchange = ValueError("The vector does not fit.")
    fakes.decisions = [NO]
    result = await fakes.runner().run(UPDATE)
    assert not result.committed
    assert result.attempts == 1
