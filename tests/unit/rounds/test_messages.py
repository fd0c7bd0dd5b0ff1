"""Messages come back as they went, and nothing else is taken for one."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.rounds.messages import MAX_ROSTER, Enrol, EnrolReply, MessageError, Roster, Status, Vote

D = bytes(range(32))
ROSTER = Roster(round=4, digest=D, nonce=bytes(16), members=("peer-aaa", "peer-bbb"), samples=(3, 1), losses=(1.0, 5.0))
ALL = [
    Status(round=1, digest=D, phase="vote", samples=3, tokens_per_s=1.5),
    Enrol(round=1, digest=D, samples=1, loss=0.0),
    EnrolReply(accepted=True, round=1, digest=D),
    ROSTER,
    Vote(group=D, aggregate=b""),
    Vote(group=D, aggregate=D),
]
KINDS = [Status, Enrol, EnrolReply, Roster, Vote]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_message_comes_back(message):
    assert type(message).unpack(message.pack()) == message


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=200) | values.map(msgpack.packb) | st.lists(values, max_size=7).map(msgpack.packb))
def test_bytes_raise_nothing_but_message_error(kind, data):
    try:
        message = kind.unpack(data)
    except MessageError:
        return
    assert kind.unpack(message.pack()) == message


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
@given(data=st.data())
def test_damaged_messages_raise_nothing_but_message_error(message, data):
    packed = bytearray(message.pack())
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageError):
        type(message).unpack(bytes(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_bytes_are_not_opened(kind):
    with pytest.raises(MessageError, match="more than"):
        kind.unpack(bytes(kind.max_bytes + 1))


def test_a_deep_nest_is_refused():
    with pytest.raises(MessageError):
        Roster.unpack(b"\x91" * 10000)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": (3,)},
        {"losses": (1.0,)},
        {"members": ("peer-aaa", "peer-aaa")},
        {"members": (), "samples": (), "losses": ()},
        {"samples": (0, 1)},
        {"samples": (10**9 + 1, 1)},
        {"samples": (True, 1)},
        {"losses": (float("nan"), 1.0)},
        {"losses": (-1.0, 1.0)},
        {"nonce": b""},
        {"round": -1},
        {"digest": bytes(31)},
    ],
)
def test_a_roster_that_cannot_be_is_refused(change):
    fields = {name: getattr(ROSTER, name) for name in Roster.model_fields} | change
    with pytest.raises(MessageError):
        Roster.unpack(msgpack.packb(list(fields.values())))


def test_the_largest_roster_fits():
    members = tuple(f"{number:0128d}" for number in range(MAX_ROSTER))
    many = ROSTER.model_copy(update={"members": members, "samples": (10**9,) * 64, "losses": (1e6,) * 64})
    assert Roster.unpack(many.pack()) == many


def test_a_roster_weighs_losses_by_samples():
    assert ROSTER.total_samples == 4
    assert ROSTER.mean_loss == 2.0


def test_half_a_digest_is_no_vote():
    with pytest.raises(MessageError):
        Vote.unpack(msgpack.packb([D, D[:16]]))
