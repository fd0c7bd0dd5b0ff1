"""What a record says: its name, who voted, and what a signature of it is good for."""

from __future__ import annotations

import dataclasses

import pytest
from record_samples import BASE, BODY, PEERS, RECORD, RUN, identity

from p2pllm.rounds.record import (
    Checkpoint,
    Record,
    genesis,
    is_holding,
    is_vote,
    sign_holding,
    sign_vote,
)


def test_votes_are_no_part_of_the_name_and_are_put_in_order() -> None:
    given_votes = {peer.peer_id: sign_vote(peer, BODY.digest) for peer in PEERS}
    all_of_them = Record.of(BODY, given_votes)
    assert all_of_them == Record.of(BODY, dict(reversed(given_votes.items())))
    assert all_of_them.head == RECORD.head == (7, BODY.digest)
    assert all_of_them.pack() != RECORD.pack()
    assert set(all_of_them.voters) == set(BODY.peers) == {peer.peer_id for peer in PEERS}


@dataclasses.dataclass(frozen=True)
class Count:
    """How many of so many members voted."""

    votes: int
    members: int


@pytest.mark.parametrize(
    ("count", "majority"),
    [(Count(1, 1), True), (Count(1, 2), False), (Count(1, 3), False), (Count(2, 3), True), (Count(2, 2), True)],
)
def test_a_majority_is_more_than_half_of_the_members(count: Count, majority: bool) -> None:
    body = BODY.model_copy(update={"members": BODY.members[: count.members]})
    record = Record.of(body, {peer.peer_id: bytes(64) for peer in PEERS[: count.votes]})
    assert record.has_majority is majority


def test_votes_of_strangers_make_no_majority() -> None:
    strangers = [identity(seed) for seed in range(7, 10)]
    assert not Record.of(BODY, {peer.peer_id: bytes(64) for peer in [PEERS[0], *strangers]}).has_majority


def test_what_a_body_says() -> None:
    assert BODY.base == BASE
    assert BODY.samples == 10 + 11 + 12
    assert BODY.loss == 2.5
    weighed = BODY.model_copy(
        update={
            "members": (
                BODY.members[0].model_copy(update={"samples": 3, "loss": 1.0}),
                BODY.members[1].model_copy(update={"samples": 1, "loss": 5.0}),
            )
        }
    )
    assert weighed.loss == 2.0


def test_a_vote_is_for_one_body_by_one_peer() -> None:
    vote = sign_vote(PEERS[0], BODY.digest)
    assert is_vote(PEERS[0].peer_id, BODY.digest, vote)
    assert not is_vote(PEERS[1].peer_id, BODY.digest, vote)
    assert not is_vote(PEERS[0].peer_id, bytes(32), vote)


def test_a_holding_is_of_one_body_at_one_head_by_one_peer() -> None:
    held = sign_holding(PEERS[0], BODY.base, BODY.digest)
    assert is_holding(PEERS[0].peer_id, BODY.base, BODY.digest, held)
    assert not is_holding(PEERS[1].peer_id, BODY.base, BODY.digest, held)
    assert not is_holding(PEERS[0].peer_id, BODY.head, BODY.digest, held)
    assert not is_holding(PEERS[0].peer_id, BODY.base, bytes(32), held)


def test_a_checkpoint_is_the_founders_word_for_one_record_of_one_run() -> None:
    point = Checkpoint.sign(PEERS[0], RUN, BODY.head)
    assert Checkpoint.unpack(point.pack()) == point and point.head == BODY.head
    assert point.is_signed(PEERS[0].peer_id)
    assert not point.is_signed(PEERS[1].peer_id)
    for change in ({"run": bytes(32)}, {"round": 8}, {"record": bytes(32)}, {"signature": bytes(64)}):
        assert not point.model_copy(update=change).is_signed(PEERS[0].peer_id)


def test_no_signature_serves_another_purpose() -> None:
    """A claim, a vote and a checkpoint over the same bytes differ in their domain."""
    vote, checkpoint = sign_vote(PEERS[0], BODY.digest), Checkpoint.sign(PEERS[0], RUN, BODY.head)
    assert not is_vote(PEERS[0].peer_id, BODY.digest, checkpoint.signature)
    assert not is_holding(PEERS[0].peer_id, BODY.base, BODY.digest, vote)
    assert not checkpoint.model_copy(update={"signature": vote}).is_signed(PEERS[0].peer_id)
    assert not BODY.members[0].model_copy(update={"signature": vote}).is_signed(BASE)


def test_every_run_has_its_own_beginning() -> None:
    assert genesis(RUN)[0] == 0
    assert genesis(RUN) == genesis(RUN) != genesis("00" * 32)
