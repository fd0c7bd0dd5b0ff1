"""Records come back as they went, have one spelling, and every byte of one is vouched for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_samples import BASE, BODY, RECORD

from p2pllm.rounds.chain import check_claims, check_votes
from p2pllm.rounds.packing import MAX_ROSTER, MessageError
from p2pllm.rounds.record import (
    MAX_RECORD_BYTES,
    Body,
    Claim,
    Record,
    pack_all,
    unpack_all,
)

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
    total=st.integers(5 * 10**9, 10**18),
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


def test_a_record_has_no_more_samples_than_all_behind_it() -> None:
    assert Body.unpack(BODY.model_copy(update={"total": BODY.samples}).pack()).total == BODY.samples
    with pytest.raises(MessageError, match="Body"):
        Body.unpack(BODY.model_copy(update={"total": BODY.samples - 1}).pack())


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
    check_claims(RECORD.body)
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
