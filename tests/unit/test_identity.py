"""Keys, peer ids and signatures."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import StateError
from p2pllm.identity import Identity, is_peer_id, peer_id_of, public_key_of, verify

ALICE = Identity.generate()


def test_known_peer_id():
    # an example of an Ed25519 peer id in libp2p's specification
    peer = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
    assert peer_id_of(public_key_of(peer)) == peer


def test_created_file_is_private_and_read_again(tmp_path):
    path = tmp_path / "deep" / "keys" / "identity.key"
    first = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_bytes()[:4] == b"\x08\x01\x12\x40" and len(path.read_bytes()) == 68
    assert Identity.load_or_create(path).peer_id == first.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.key"]


def test_key_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "key"
    Identity.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(StateError, match="chmod 600"):
        Identity.load_or_create(path)


@pytest.mark.parametrize("damage", [b"", b"\x08\x01\x12\x40", bytes(68), bytes(500)])
def test_damaged_file_is_one_sentence(tmp_path, damage):
    path = tmp_path / "key"
    path.write_bytes(damage)
    path.chmod(0o600)
    with pytest.raises(StateError, match="damaged"):
        Identity.load_or_create(path)


@pytest.mark.parametrize("position", range(0, 68, 5))
def test_any_flipped_bit_of_a_key_file_is_found(tmp_path, position):
    path = tmp_path / "key"
    Identity.load_or_create(path)
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StateError, match="damaged"):
        Identity.load_or_create(path)


def test_a_folder_in_place_of_the_key(tmp_path):
    with pytest.raises(StateError, match="cannot be used"):
        Identity.load_or_create(tmp_path)


def test_the_loser_of_a_race_takes_the_winners_key(tmp_path, monkeypatch):
    path = tmp_path / "key"
    link = os.link

    def slower(source, target):
        monkeypatch.setattr(os, "link", link)
        Identity.load_or_create(path)
        link(source, target)

    monkeypatch.setattr(os, "link", slower)
    assert Identity.load_or_create(path).peer_id == Identity.load_or_create(path).peer_id
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


@given(
    data=st.binary(max_size=100),
    domain=st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=20),
)
def test_signature_holds_for_its_data_and_domain_only(data, domain):
    signature = ALICE.sign(domain, data)
    assert verify(ALICE.peer_id, domain, data, signature)
    assert not verify(ALICE.peer_id, domain + "x", data, signature)
    assert not verify(ALICE.peer_id, domain, data + b"x", signature)
    assert not verify(Identity.generate().peer_id, domain, data, signature)


@given(peer=st.text(max_size=80), signature=st.binary(max_size=80))
def test_verify_never_raises(peer, signature):
    assert not verify(peer, "d", b"data", signature)
    assert not verify("12D3Koo" + peer, "d", b"data", signature)
    assert not verify(ALICE.peer_id, "d", b"data", signature)


@pytest.mark.parametrize("value", [None, 7, b"12D3KooW", "", "12D3KooW", "1" * 52, "12D3Koo" + "z" * 45, "12D3Koo0OIl"])
def test_what_is_no_peer_id(value):
    assert not is_peer_id(value)
    assert not verify(value, "d", b"", bytes(64))


@given(st.binary(min_size=32, max_size=32))
def test_peer_id_round_trip(key):
    assert public_key_of(peer_id_of(key)) == key
