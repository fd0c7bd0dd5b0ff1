"""Messages come back as they went, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.rounds.messages import MAX_ROSTER, Enrol, EnrolReply, MessageError, Roster, Status, Vote
from p2pllm.rounds.packing import Message
from p2pllm.rounds.record import Claim
from p2pllm.testing import identity_number

D = bytes(range(32))
SIGNATURE = bytes(64)
ONE, TWO = (Claim.sign(identity_number(number), (4, D), 3 - 2 * number, 1.0 + 4 * number, D) for number in range(2))
ROSTER = Roster(round=4, digest=D, nonce=bytes(16), claims=(ONE, TWO), proposal=b"", holders=())
ALL: list[Message] = [
    Status(round=1, digest=D, total=12, anchor=1, phase="vote", samples=3, tokens_per_s=1.5),
    Enrol(round=4, digest=D, claim=ONE, holding=b"", proof=b""),
    Enrol(round=4, digest=D, claim=ONE, holding=D, proof=SIGNATURE),
    EnrolReply(accepted=True),
    ROSTER,
    ROSTER.model_copy(update={"proposal": D, "holders": ((1, SIGNATURE),)}),
    Vote(group=D, body=b"", signature=b""),
    Vote(group=D, body=D, signature=SIGNATURE),
]
KINDS: list[type[Message]] = [Status, Enrol, EnrolReply, Roster, Vote]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)


def packed_with(message: Message, change: dict[str, Any]) -> bytes:
    """The message with other values in its fields, whether they may be there or not."""
    fields = dict(zip(type(message).model_fields, msgpack.unpackb(message.pack()), strict=True)) | change
    packed: bytes = msgpack.packb(list(fields.values()))
    return packed


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_message_comes_back(message: Message) -> None:
    assert type(message).unpack(message.pack()) == message


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(data=st.binary(max_size=200) | values.map(msgpack.packb) | st.lists(values, max_size=7).map(msgpack.packb))
def test_bytes_raise_nothing_but_message_error(kind: type[Message], data: bytes) -> None:
    try:
        message = kind.unpack(data)
    except MessageError:
        return
    assert kind.unpack(message.pack()) == message


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
@settings(max_examples=50)
@given(data=st.data())
def test_damaged_messages_raise_nothing_but_message_error(message: Message, data: st.DataObject) -> None:
    packed = bytearray(message.pack())
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageError):
        type(message).unpack(bytes(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_bytes_are_not_opened(kind: type[Message]) -> None:
    with pytest.raises(MessageError, match="more than"):
        kind.unpack(bytes(kind.max_bytes + 1))


def test_a_deep_nest_is_refused() -> None:
    with pytest.raises(MessageError):
        Roster.unpack(b"\x91" * 10000)


A_CLAIM = msgpack.unpackb(ONE.pack())


@pytest.mark.parametrize(
    "change",
    [
        {"claims": ()},
        {"claims": (A_CLAIM, A_CLAIM)},
        {"claims": (A_CLAIM[:-1],)},
        {"claims": ([*A_CLAIM, 0],)},
        {"claims": ([A_CLAIM[0], 0, *A_CLAIM[2:]],)},  # no samples
        {"claims": ([A_CLAIM[0], 10**9 + 1, *A_CLAIM[2:]],)},
        {"claims": ([A_CLAIM[0], True, *A_CLAIM[2:]],)},
        {"claims": ([*A_CLAIM[:2], float("nan"), *A_CLAIM[3:]],)},
        {"claims": ([*A_CLAIM[:2], -1.0, *A_CLAIM[3:]],)},
        {"claims": ([b"short", *A_CLAIM[1:]],)},
        {"proposal": D},  # and nobody holds it
        {"holders": ((0, SIGNATURE),)},
        {"proposal": D, "holders": ((2, SIGNATURE),)},
        {"proposal": D, "holders": ((-1, SIGNATURE),)},
        {"proposal": D, "holders": ((0, SIGNATURE[:63]),)},
        {"proposal": D, "holders": (0,)},
        {"proposal": D[:16], "holders": ((0, SIGNATURE),)},
        {"nonce": b""},
        {"round": -1},
        {"digest": bytes(31)},
    ],
)
def test_a_roster_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    assert Roster.unpack(packed_with(ROSTER, {})) == ROSTER
    with pytest.raises(MessageError):
        Roster.unpack(packed_with(ROSTER, change))


@pytest.mark.parametrize(
    "change",
    [
        {"total": -1},
        {"total": 10**18 + 1},
        {"anchor": -1},
        {"phase": "asleep"},
        {"tokens_per_s": float("inf")},
        {"digest": b""},
    ],
)
def test_a_status_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        Status.unpack(packed_with(ALL[0], change))


def test_the_largest_roster_fits() -> None:
    claims = tuple(Claim.sign(identity_number(number), (4, D), 10**9, 1e6, D) for number in range(MAX_ROSTER))
    holders = tuple((place, SIGNATURE) for place in range(MAX_ROSTER))
    many = ROSTER.model_copy(update={"round": 10**9, "claims": claims, "proposal": D, "holders": holders})
    assert Roster.unpack(many.pack()) == many
    one_more = Claim.sign(identity_number(MAX_ROSTER), (4, D), 1, 1.0, D)
    with pytest.raises(MessageError):
        Roster.unpack(many.model_copy(update={"claims": (*claims, one_more)}).pack())


def test_a_roster_names_its_members_and_holders_in_order() -> None:
    first, second = identity_number(0).peer_id, identity_number(1).peer_id
    assert ROSTER.members == (first, second)
    assert ROSTER.holding == []
    assert ROSTER.model_copy(update={"proposal": D, "holders": ((1, SIGNATURE),)}).holding == [second]
    assert ROSTER.head == (4, D)


@pytest.mark.parametrize(("body", "signature"), [(D[:16], SIGNATURE), (D, b""), (b"", SIGNATURE), (D, SIGNATURE[:63])])
def test_a_vote_is_for_a_whole_digest_and_signed_or_for_nothing(body: bytes, signature: bytes) -> None:
    with pytest.raises(MessageError):
        Vote.unpack(msgpack.packb([D, body, signature]))
