"""Invites: round trip, and every kind of damage."""

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.errors import InviteError
from p2pllm.invite import MAX_ADDRESSES, Invite, _base32, _checksum
from p2pllm.testing import peer_number

FOUNDER = peer_number(0)
OTHER = peer_number(1)
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"

places = st.one_of(
    st.builds("/ip4/{}/tcp/{}".format, st.ip_addresses(v=4), st.integers(1, 65535)),
    st.builds("/ip6/{}/tcp/{}".format, st.ip_addresses(v=6), st.integers(1, 65535)),
    st.builds("/dns4/peer{}.example.org/tcp/{}".format, st.integers(0, 99), st.integers(1, 65535)),
    st.builds("/ip4/{}/udp/{}/quic-v1".format, st.ip_addresses(v=4), st.integers(1, 65535)),
)
addresses = st.builds("{}/p2p/{}".format, places, st.sampled_from([FOUNDER, OTHER]))
invites = st.builds(
    Invite,
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.just(FOUNDER),
    st.lists(addresses, min_size=1, max_size=MAX_ADDRESSES).map(tuple),
)
INVITE = Invite("5a" * 32, FOUNDER, ("/ip4/192.0.2.1/tcp/4001", f"/dns4/example.org/tcp/443/p2p/{OTHER}"))


@given(invites)
def test_round_trip(invite):
    text = invite.encode()
    assert Invite.decode(text) == invite
    assert text.startswith("p2pllm:") and set(text[7:]) <= set(ALPHABET)


def test_addresses_without_a_peer_are_the_founders():
    assert INVITE.addresses[0] == f"/ip4/192.0.2.1/tcp/4001/p2p/{FOUNDER}"


def test_addresses_are_brought_into_their_usual_spelling():
    invite = Invite("5a" * 32, FOUNDER, ("/ip6/0:0::ffff:0:0/tcp/1",))
    assert Invite.decode(invite.encode()) == invite
    assert Invite("5a" * 32, FOUNDER, invite.addresses) == invite


def test_relayed_address():
    relayed = f"/ip4/192.0.2.1/tcp/4001/p2p/{OTHER}/p2p-circuit"
    invite = Invite("5a" * 32, FOUNDER, (relayed,))
    assert invite.addresses == (f"{relayed}/p2p/{FOUNDER}",)
    assert Invite.decode(invite.encode()) == invite


@pytest.mark.parametrize("around", ["{}", " {}\n", '"{}"', "'{}'", "<{}>", "({}).", "`{}`,"])
def test_what_people_paste_around_it(around):
    assert Invite.decode(around.format(INVITE.encode())) == INVITE
    assert Invite.decode(around.format(INVITE.encode().upper())) == INVITE


def test_every_substitution_is_caught():
    text = INVITE.encode()
    for position in range(len(text)):
        for wrong in ALPHABET + "01-":
            if wrong != text[position]:
                with pytest.raises(InviteError):
                    Invite.decode(text[:position] + wrong + text[position + 1 :])


def test_every_swap_loss_and_repetition_is_caught():
    text = INVITE.encode()
    for i in range(len(text)):
        damaged = {text[:i] + text[i + 1 :], text[: i + 1] + text[i:], text[:i]}
        damaged.add(text[:i] + text[i : i + 2][::-1] + text[i + 2 :])
        for wrong in damaged - {text}:
            with pytest.raises(InviteError):
                Invite.decode(wrong)


@given(invites, st.data())
@settings(max_examples=200)
def test_substitutions_in_any_invite_are_caught(invite, data):
    text = invite.encode()
    position = data.draw(st.integers(0, len(text) - 1))
    wrong = data.draw(st.sampled_from(ALPHABET).filter(lambda c: c != text[position]))
    with pytest.raises(InviteError):
        Invite.decode(text[:position] + wrong + text[position + 1 :])


@given(st.one_of(st.text(), st.text(ALPHABET + "p2pllm:").map("p2pllm:".__add__)))
def test_fuzzed_text(text):
    with pytest.raises(InviteError):
        Invite.decode(text)


@given(st.binary(max_size=400), st.integers(0, 255))
def test_fuzzed_bytes_with_a_right_checksum(body, version):
    head = bytes((version,)) + (len(body) + 9).to_bytes(2, "big")
    with contextlib.suppress(InviteError):
        Invite.decode("p2pllm:" + _base32(head + body + _checksum(head + body)))


def test_each_damage_has_its_own_sentence():
    text = INVITE.encode()
    wrong = "a" if text[60] != "a" else "b"
    for damaged, says in (
        (text[:-10], "cut off"),
        (text[:20], "cut off"),
        ("p2pllm:", "cut off"),
        (text[:60] + wrong + text[61:], "mistyped"),
        (text[:60] + "0" + text[61:], "mistyped: '0'"),
        ("hello", "not an invite"),
        ("", "not an invite"),
        ("https://example.org", "not an invite"),
    ):
        with pytest.raises(InviteError, match=says) as caught:
            Invite.decode(damaged)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_newer_version_says_so():
    body = bytes(80)
    head = bytes((2,)) + (len(body) + 9).to_bytes(2, "big")
    with pytest.raises(InviteError, match="newer"):
        Invite.decode("p2pllm:" + _base32(head + body + _checksum(head + body)))


@pytest.mark.parametrize(
    ("run_id", "founder", "known"),
    [
        ("5A" * 32, FOUNDER, ("/ip4/1.2.3.4/tcp/1",)),
        ("5a" * 32, "nobody", ("/ip4/1.2.3.4/tcp/1",)),
        ("5a" * 32, FOUNDER, ()),
        ("5a" * 32, FOUNDER, ("/ip4/1.2.3.4/tcp/1",) * 9),
        ("5a" * 32, FOUNDER, ("1.2.3.4:5",)),
        ("5a" * 32, FOUNDER, ("/ip4/1.2.3.4/tcp/99999",)),
        ("5a" * 32, FOUNDER, ("/dns4/" + "a" * 200 + "/tcp/1",)),
        ("5a" * 32, FOUNDER, ("",)),
    ],
)
def test_values_that_no_run_has(run_id, founder, known):
    with pytest.raises(InviteError):
        Invite(run_id, founder, known)


def test_import_is_cheap():
    code = "import p2pllm.invite, sys; assert not {'hivemind', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
