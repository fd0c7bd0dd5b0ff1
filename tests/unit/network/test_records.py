"""Member records and what the DHT's validator lets through."""

import dataclasses

import pytest
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.identity import Identity, peer_id_of
from p2pllm.network.dht import (
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    RECORD_SECONDS,
    MemberRecord,
    MemberValidator,
    directory_key,
)
from p2pllm.network.messages import pack

RUN = "5a" * 32
NOW = 1_700_000_000.0
KEY = DHTID.generate(source=directory_key(RUN)).to_bytes()
ANN, BOB = Identity.generate(), Identity.generate()


def record(identity=ANN, run=RUN, addresses=("/ip4/10.0.0.1/tcp/1",), issued=NOW):
    return MemberRecord.sign(identity, run, addresses, issued)


def stored(member, **changes):
    made = DHTRecord(KEY, pack(member.peer), pack(member.encode()), member.issued + RECORD_SECONDS)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def validator():
    return MemberValidator(RUN, lambda: NOW)


def test_a_record_carries_a_bounded_signed_status() -> None:
    made = MemberRecord.sign(ANN, RUN, ["/ip4/10.0.0.1/tcp/1"], NOW, b"s" * 160)
    assert MemberRecord.decode(made.encode(), RUN).status == b"s" * 160
    for status in (b"t" * 160, b"s" * 161):
        with pytest.raises(ValueError):
            MemberRecord.decode(dataclasses.replace(made, status=status).encode(), RUN)


def test_honest_record(validator):
    assert validator.validate(stored(record()))
    assert MemberRecord.decode(record().encode(), RUN) == record()


def test_what_is_refused(validator):
    honest = record()
    forged = dataclasses.replace(honest, peer=BOB.peer_id)
    far = record(issued=NOW + 10_000)
    for name, wrong in {
        "another key": stored(honest, key=bytes(20)),
        "another's subkey": stored(honest, subkey=pack(BOB.peer_id)),
        "no subkey": stored(honest, subkey=pack(None)),
        "prolonged": stored(honest, expiration_time=NOW + 2 * RECORD_SECONDS),
        "not a number": stored(honest, expiration_time=float("nan")),
        "too far ahead": stored(far),
        "not signed by its peer": stored(forged),
        "another run": stored(record(run="00" * 32)),
        "changed": stored(dataclasses.replace(honest, addresses=("/ip4/6.6.6.6/tcp/1",))),
        "not bytes": stored(honest, value=pack("text")),
        "too long": stored(honest, value=pack(honest.encode() + bytes(MAX_RECORD_BYTES))),
        "empty": stored(honest, value=b""),
    }.items():
        assert not validator.validate(wrong), name


def test_record_is_cut_to_its_bound():
    long = [f"/dns4/{'x' * 100}{n}.example/tcp/1" for n in range(8)]
    made = record(addresses=long)
    assert len(made.encode()) <= MAX_RECORD_BYTES and made.addresses == tuple(long[: len(made.addresses)])
    assert len(made.addresses) >= 4


def test_number_of_records_is_bounded():
    now = [NOW]
    validator = MemberValidator(RUN, lambda: now[0])
    for number in range(MAX_RECORDS):
        validator._stored[pack(peer_id_of(number.to_bytes(32, "big")))] = NOW + 10
    assert not validator.validate(stored(record()))
    now[0] += 20
    assert validator.validate(stored(record()))


@given(st.binary(max_size=300), st.binary(max_size=60), st.floats())
def test_validator_never_raises(value, subkey, expires):
    validator = MemberValidator(RUN, lambda: NOW)
    assert not validator.validate(DHTRecord(KEY, subkey, value, expires))
    assert not validator.validate(DHTRecord(KEY, subkey, pack(value), NOW))
