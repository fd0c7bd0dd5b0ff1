"""What is checked before p2pd starts, and small helpers of the network."""

import resource
import socket
import stat

import pytest

from p2pllm.errors import NetworkError, SettingsError
from p2pllm.identity import Identity
from p2pllm.network import host
from p2pllm.network.addresses import checked_addresses, ordered, port_of, reach, split
from p2pllm.network.book import MAX_PEERS, AddressBook
from p2pllm.network.messages import pack, unpack

PEER = Identity.generate().peer_id


def test_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NetworkError, match=f"Port {port} "):
            host.check_listen("127.0.0.1", port)
    host.check_listen("127.0.0.1", port)


@pytest.mark.parametrize("address", ["example.org", "", "300.1.1.1", "192.0.2.77"])
def test_address_that_is_not_ours(address):
    with pytest.raises(SettingsError):
        host.check_listen(address, 0)


def test_runtime_folder(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir(mode=0o777)
    host.prepare_runtime_dir(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises(SettingsError, match="longer"):
        host.prepare_runtime_dir(tmp_path / ("x" * 100))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(SettingsError, match="somebody else"):
        host.prepare_runtime_dir(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be made"):
        host.prepare_runtime_dir(tmp_path / "file")


def test_file_limit_is_only_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    host.raise_file_limit()
    after = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert after[0] >= before[0] and after[1] == before[1]


def test_addresses():
    assert split(f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}") == (PEER, b"\x04\x01\x02\x03\x04\x06\x00\x05")
    assert ordered(["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1"])[-1].startswith("/ip4/127")
    assert port_of("/ip4/1.2.3.4/tcp/5") == 5 and port_of("/ip4/1.2.3.4/udp/5") is None
    for wrong in ("", "/", "/p2p/x", f"x/p2p/{PEER}", f"/ip4/999.1.1.1/tcp/1/p2p/{PEER}", "/" + "a" * 1000):
        with pytest.raises(ValueError):
            split(wrong)
    for strange in (None, ["/a"] * 9, [1], ["a"], ["/" + "a" * 192], ["/ä"], ["/a\n"]):
        with pytest.raises(ValueError):
            checked_addresses(strange)


def test_book_keeps_peers_that_we_talk_with():
    book = AddressBook()
    other = Identity.generate().peer_id
    book.learn(PEER, [f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}", "/nonsense", f"/ip4/1.2.3.4/tcp/5/p2p/{other}"])
    assert book.meet(PEER) and not book.meet(PEER)
    for number in range(2 * MAX_PEERS):
        book.learn(f"peer {number}", ["/a"])
    assert len(book.places(PEER)) == 1
    assert f"peer {2 * MAX_PEERS - 1}" in book and "peer 0" not in book
    assert book.forget_met() == {PEER} and not book.has_met(PEER)


def test_messages_are_bounded():
    assert unpack(pack([1, "a", b"b", None, {"c": 1.5}]), 100) == [1, "a", b"b", None, {"c": 1.5}]
    for wrong in (
        b"",
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        pack(1) + b"x",
        b"\xd4\x01\x00",
    ):
        with pytest.raises(ValueError):
            unpack(wrong, 100)
    with pytest.raises(ValueError):
        unpack(pack("x" * 200), 100)
    with pytest.raises(ValueError):
        unpack(b"\x91" * 5000, 10_000)


@pytest.mark.parametrize(
    ("addresses", "kind"),
    [
        ([], ""),
        (["/ip4/127.0.0.1/tcp/5", "/ip4/192.168.1.7/tcp/5", "/dns4/name/tcp/5"], ""),
        (["/ip4/192.168.1.7/tcp/5", "/ip4/8.8.8.8/tcp/5/p2p/Qm/p2p-circuit"], "relay"),
        (["/ip4/8.8.8.8/tcp/5/p2p/Qm/p2p-circuit", "/ip6/2600::1/tcp/5"], "direct"),
    ],
)
def test_how_the_internet_gets_to_a_peer(addresses: list[str], kind: str) -> None:
    assert reach(addresses) == kind
