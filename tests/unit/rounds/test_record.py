"""Records come back as they went, have one spelling, and every byte of one is vouched for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.identity import Identity
from p2pllm.rounds.chain import check_claims, check_votes
from p2pllm.rounds.packing import MAX_ROSTER, MessageError
from p2pllm.rounds.record import (
    MAX_RECORD_BYTES,
    Body,
    Checkpoint,
    Claim,
    Head,
    Record,
    genesis,
    is_vote,
    pack_all,
    sign_vote,
    unpack_all,
)


def identity(seed: int) -> Identity:
    """The same keys in every run: random bytes would look like something else once in a while."""
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


RUN = "5a" * 32
BASE: Head = (6, bytes(range(32)))
PEERS = [identity(seed) for seed in range(3)]
BODY = Body(
    run=bytes.fromhex(RUN),
    round=7,
    previous=BASE[1],
    total=1000,
    members=tuple(Claim.sign(peer, BASE, 10 + at, 2.5, bytes([at]) * 32) for at, peer in enumerate(PEERS)),
    aggregate=bytes([8]) * 32,
    state=bytes([9]) * 32,
)
RECORD = Record.of(BODY, {peer.peer_id: sign_vote(peer, BODY.digest) for peer in PEERS[:2]})

digests = st.binary(min_size=32, max_size=32)
signatures = st.binary(min_size=64, max_size=64)
claims = st.builds(
    Claim,
    key=digests,
    samples=st.integers(1, 10**9),
    loss=st.floats(0, 1e6),
    update=digests,
    signature=signatures,
)
bodies = st.builds(
    Body,
    run=digests,
    round=st.integers(1, 10**9),
    previous=digests,
    total=st.integers(0, 10**18),
    members=st.lists(claims, min_size=1, max_size=5, unique_by=lambda claim: claim.key).map(tuple),
    aggregate=digests,
    state=digests,
)
votes = st.dictionaries(digests, signatures, min_size=1, max_size=5)
records = st.builds(Record, body=bodies, votes=votes.map(lambda given: tuple(sorted(given.items()))))


@given(records)
def test_a_record_comes_back_as_it_went(record: Record) -> None:
    back = Record.unpack(record.pack())
    assert back == record
    assert back.pack() == record.pack()
    assert back.body.digest == Body.unpack(record.body.pack()).digest == record.body.digest


@given(st.lists(records, max_size=4))
def test_many_records_come_back_and_nothing_cut_or_beyond_the_bound_does(many: list[Record]) -> None:
    joined = pack_all([record.pack() for record in many])
    assert unpack_all(joined, len(many)) == many
    if many:
        for spoilt, most in [(joined, len(many) - 1), (joined[:-1], len(many)), (joined + b"\0", len(many) + 1)]:
            with pytest.raises(MessageError):
                unpack_all(spoilt, most)


def test_a_length_beyond_the_bound_is_refused() -> None:
    size = MAX_RECORD_BYTES + 1
    with pytest.raises(MessageError, match="asked for"):
        unpack_all(size.to_bytes(4, "big") + bytes(size), 1)


def test_every_flipped_byte_is_refused_or_changes_the_name_or_breaks_a_signature() -> None:
    packed, undetected = RECORD.pack(), list[int]()
    check_votes(RECORD)
    check_claims(RECORD)
    for at in range(len(packed)):
        flipped = bytearray(packed)
        flipped[at] ^= 1 << at % 8
        try:
            record = Record.unpack(bytes(flipped))
            if record.body.digest == BODY.digest:
                check_votes(record)
                undetected.append(at)
        except MessageError:
            continue
    assert undetected == []


@given(st.data())
def test_no_claim_stands_with_another_value(data: st.DataObject) -> None:
    """Whoever changes what a member brought needs its key."""
    at = data.draw(st.integers(0, 2))
    claim = BODY.members[at]
    name = data.draw(st.sampled_from(["samples", "loss", "update", "key"]))
    other = data.draw(
        {"samples": st.integers(1, 10**9), "loss": st.floats(0, 1e6), "update": digests, "key": digests}[name].filter(
            lambda value: value != getattr(claim, name)
        )
    )
    assert claim.is_signed(BASE)
    assert not claim.model_copy(update={name: other}).is_signed(BASE)
    assert not claim.is_signed((BASE[0] + 1, BASE[1])) and not claim.is_signed((BASE[0], bytes(32)))


def spelt(record: Record, change: Callable[[list[Any], list[Any]], None]) -> bytes:
    """The record as msgpack after a change to its (body, votes) as lists."""
    body, signed = msgpack.unpackb(record.pack(), use_list=True)
    change(body, signed)
    packed: bytes = msgpack.packb([body, signed])
    return packed


def test_only_the_canonical_bytes_are_a_record() -> None:
    packed = RECORD.pack()
    body, signed = msgpack.unpackb(packed)
    names = list(Body.model_fields)
    digest = b"\xc4\x20" + BODY.aggregate
    samples = bytes([BODY.members[0].samples])
    spellings = {
        "a byte after it": packed + b"\0",
        "cut off": packed[:-1],
        "an array16": b"\xdc\x00\x02" + packed[1:],
        "an array32": b"\xdd\x00\x00\x00\x02" + packed[1:],
        "bin16": packed.replace(digest, b"\xc5\x00\x20" + BODY.aggregate),
        "a string for bytes": packed.replace(digest, b"\xd9\x20" + BODY.aggregate),
        "a wide round": packed.replace(b"\x07\xc4\x20" + BODY.previous, b"\xcc\x07\xc4\x20" + BODY.previous),
        "a signed round": packed.replace(b"\x07\xc4\x20" + BODY.previous, b"\xd0\x07\xc4\x20" + BODY.previous),
        "wide samples": packed.replace(samples + b"\xcb", b"\xce\x00\x00\x00" + samples + b"\xcb", 1),
        "a loss as float32": packed.replace(msgpack.packb(2.5), msgpack.packb(2.5, use_single_float=True)),
        "a map for the body": msgpack.packb([dict(zip(names, body, strict=True)), signed]),
    }
    assert Record.unpack(packed) == RECORD
    for name, other in spellings.items():
        assert other != packed, name
        with pytest.raises(MessageError):
            Record.unpack(other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 2),  # version
        (1, bytes(31)),  # run
        (2, 0),  # round
        (2, 10**9 + 1),
        (2, True),
        (2, 7.0),
        (3, bytes(33)),  # previous
        (4, -1),  # total
        (4, 10**18 + 1),
        (5, []),  # members
        (5, None),
        (6, ""),  # aggregate
        (7, None),  # state
    ],
)
def test_a_body_out_of_its_bounds_is_refused(field: int, value: object) -> None:
    with pytest.raises(MessageError):
        Record.unpack(spelt(RECORD, lambda body, _: body.__setitem__(field, value)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, bytes(31)),  # key
        (1, 0),  # samples
        (1, 10**9 + 1),
        (2, -0.5),  # loss
        (2, float("nan")),
        (2, float("inf")),
        (2, 1e7),
        (2, 2),
        (3, b""),  # update
        (4, bytes(63)),  # signature
    ],
)
def test_a_claim_out_of_its_bounds_is_refused(field: int, value: object) -> None:
    with pytest.raises(MessageError):
        Record.unpack(spelt(RECORD, lambda body, _: body[5][1].__setitem__(field, value)))


def test_members_and_votes_are_bounded_named_once_and_votes_are_sorted() -> None:
    crowd = [[at.to_bytes(32, "big"), 1, 1.0, bytes(32), bytes(64)] for at in range(MAX_ROSTER + 1)]
    voters = [[at.to_bytes(32, "big"), bytes(64)] for at in range(MAX_ROSTER + 1)]

    def setting(members: list[Any], signed: list[Any]) -> bytes:
        return msgpack.packb([[*BODY_FIELDS[:5], members, *BODY_FIELDS[6:]], signed])  # type: ignore[no-any-return]

    full = setting(crowd[:-1], voters[:-1])
    assert len(Record.unpack(full).voters) == MAX_ROSTER
    assert len(full) < MAX_RECORD_BYTES
    for members, signed in [
        (crowd, voters[:1]),
        (crowd[:1], voters),
        (crowd[:1], []),
        ([crowd[0], crowd[0]], voters[:1]),
        (crowd[:1], [voters[0], voters[0]]),
        (crowd[:1], [voters[1], voters[0]]),
    ]:
        with pytest.raises(MessageError):
            Record.unpack(setting(members, signed))
    with pytest.raises(MessageError, match="more than"):
        Record.unpack(full + bytes(MAX_RECORD_BYTES))


BODY_FIELDS = msgpack.unpackb(BODY.pack())


@given(st.binary(max_size=200))
def test_noise_is_no_record(noise: bytes) -> None:
    with pytest.raises(MessageError):
        Record.unpack(noise)


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
    assert not checkpoint.model_copy(update={"signature": vote}).is_signed(PEERS[0].peer_id)
    assert not BODY.members[0].model_copy(update={"signature": vote}).is_signed(BASE)


def test_every_run_has_its_own_beginning() -> None:
    assert genesis(RUN)[0] == 0
    assert genesis(RUN) == genesis(RUN) != genesis("00" * 32)
