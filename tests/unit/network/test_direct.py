"""Direct streams over real TLS sockets on loopback; the introductions, which p2pd carries, are handed over here."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import ssl
import stat
import sys
import tempfile
import termios
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pllm.averaging.channel import Channel
from p2pllm.averaging.vigil import Vigil, Want
from p2pllm.errors import NetworkError, SettingsError
from p2pllm.network import direct, door, reached
from p2pllm.network.addresses import hosts_of
from p2pllm.network.certificates import name_of, new_certificate, owner_of
from p2pllm.network.direct import TAKEN, Direct
from p2pllm.network.messages import pack, unpack
from p2pllm.network.reached import MAX_PEERS
from p2pllm.network.streams import Traffic

PROTO = "/p2pllm/1/test/mirror"
BLOCK = os.urandom(3 << 20)
with tempfile.TemporaryDirectory() as made_in:
    CERTIFICATE = new_certificate(Path(made_in) / "key.pem", "ann")


class Place:
    """Some peers that can introduce themselves to each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peers: dict[str, Direct] = {}
        self.traffic: dict[str, Traffic] = {}
        self.served: list[tuple[str, str]] = []
        self.introductions = 0
        self.handlers = {}  # of further protocols
        self.hosts = ["127.0.0.1", "127.0.0.3", "127.0.0.2"]  # the last two shut

    async def start(self, name: str) -> Direct:
        """A peer, or the same one anew."""

        async def call(peer: str, payload: bytes) -> bytes:
            self.introductions += 1
            if peer not in self.peers:
                raise NetworkError("nobody is there")
            return await self.peers[peer].introduce(name, payload)

        async def hosts(peer: str) -> list[str]:
            return self.hosts

        async def accept(peer, reader, writer) -> None:
            self.served.append(peer)
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()

        folder = self.folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        self.traffic[name] = Traffic()
        self.peers[name] = made = Direct(name, self.traffic[name], call, hosts, {PROTO: accept, **self.handlers}.get)
        await made.start(folder, "127.0.0.1", 0)
        return made


@pytest.fixture
async def place():
    with tempfile.TemporaryDirectory() as folder:
        made = Place(Path(folder))
        yield made
        for peer in made.peers.values():
            await peer.stop()
        assert list(made.folder.glob("*/*")) == []


async def mirrored(stream) -> bytes:
    """What comes back of BLOCK."""
    reader, writer = stream

    async def send():
        writer.write(BLOCK)
        await writer.drain()

    sending = asyncio.create_task(send())
    came = await asyncio.wait_for(reader.readexactly(len(BLOCK)), 20)
    await sending
    writer.close()
    return came


async def test_a_stream_carries_bytes_both_ways_and_both_ends_count_them(place: Place):
    ann, _ = await place.start("ann"), await place.start("bob")
    stream = await ann.open("bob", PROTO)
    assert stream is not None
    tls = stream[1].get_extra_info("ssl_object")
    assert tls.version() == "TLSv1.3"
    assert await mirrored(stream) == BLOCK
    assert place.served == ["ann"]
    ours, theirs = place.traffic["ann"].streams[PROTO], place.traffic["bob"].streams[PROTO]
    assert ours.received == theirs.received == theirs.sent == len(BLOCK)
    assert ours.sent == len(BLOCK)  # what says which stream it is counts no more than with p2pd
    assert place.traffic["bob"].peers["ann"].received == len(BLOCK)


async def test_no_end_holds_back_a_small_piece_until_the_one_before_it_was_acknowledged(place: Place):
    accepted = asyncio.get_running_loop().create_future()

    async def see(peer, reader, writer) -> None:
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    place.handlers["/p2pllm/1/test/see"] = see
    ann, _ = await place.start("ann"), await place.start("bob")
    _, writer = await ann.open("bob", "/p2pllm/1/test/see")
    assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert await asyncio.wait_for(accepted, 5)
    writer.close()


async def test_peers_introduce_themselves_once_for_many_streams(place: Place):
    ann, _ = await place.start("ann"), await place.start("bob")
    streams = await asyncio.gather(*(ann.open("bob", PROTO) for _ in range(8)))
    assert all(await asyncio.gather(*(mirrored(stream) for stream in streams)))
    assert place.introductions == 1


async def test_the_all_reduces_channel_reads_and_writes_through_tls(place: Place):
    ann, _ = await place.start("ann"), await place.start("bob")
    stream = await ann.open("bob", PROTO)
    assert stream is not None
    vigil = Vigil(5.0)
    channel = Channel(*stream, vigil.wait("bob", Want.PULL), vigil.wait("bob", Want.PUSH))
    await channel.take_over()
    came = bytearray(len(BLOCK))
    async with asyncio.timeout(20):
        await asyncio.gather(channel.send(BLOCK), channel.receive_into(memoryview(came)))
        assert came == BLOCK
        await place.peers["bob"].stop()
        assert await channel.ended()
    channel.abort()


async def test_who_is_slow_gets_all_that_was_sent_before_the_end(place: Place):
    sent = asyncio.Event()

    def channel_of(reader, writer) -> Channel:
        vigil = Vigil(5.0)
        return Channel(reader, writer, vigil.wait("", Want.PULL), vigil.wait("", Want.PUSH))

    async def reduce(peer, reader, writer) -> None:
        channel = channel_of(reader, writer)
        await channel.take_over()
        await channel.receive_into(memoryview(bytearray(1 << 18)))
        await channel.send(BLOCK[: 1 << 20])
        channel.close()
        sent.set()

    place.handlers["/p2pllm/1/test/reduce"] = reduce
    ann, _ = await place.start("ann"), await place.start("bob")
    channel = channel_of(*await ann.open("bob", "/p2pllm/1/test/reduce"))
    await channel.take_over()
    await channel.send(BLOCK[: 1 << 18])
    came = bytearray(1 << 20)
    async with asyncio.timeout(20):
        await sent.wait()
        await channel.receive_into(memoryview(came))
    assert came == BLOCK[: 1 << 20]
    channel.abort()


async def test_a_peer_that_was_started_anew_is_found_again(place: Place):
    ann, bob = await place.start("ann"), await place.start("bob")
    first = await ann.open("bob", PROTO)
    assert await mirrored(first) == BLOCK
    await bob.stop()
    await place.start("bob")
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK


async def test_a_dial_that_is_given_up_at_any_step_is_not_in_the_way_of_the_next(place: Place):
    ann, _ = await place.start("ann"), await place.start("bob")
    stream = await ann.open("bob", PROTO)
    assert stream is not None
    known = ann._known["bob"]
    for steps in range(40):
        dial = asyncio.create_task(ann._connect_to("127.0.0.1", known))
        for _ in range(steps):
            await asyncio.sleep(0)
        dial.cancel()
        (given_up,) = await asyncio.gather(dial, return_exceptions=True)
        following = await ann._connect_to("127.0.0.1", known)  # may get the number of the socket before
        for each in (given_up, following):
            if not isinstance(each, BaseException):
                each[1].transport.abort()
    stream[1].transport.abort()


async def test_who_is_not_reached_is_not_tried_again_for_a_while(place: Place, monkeypatch: pytest.MonkeyPatch):
    ann = await place.start("ann")
    assert await ann.open("bob", PROTO) is None
    await place.start("bob")
    assert await ann.open("bob", PROTO) is None
    assert place.introductions == 1
    now = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + reached.RETRY_S + 1)
    stream = await ann.open("bob", PROTO)
    monkeypatch.undo()
    assert await mirrored(stream) == BLOCK


async def test_a_peer_that_has_moved_is_found_when_it_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch):
    ann, bob = await place.start("ann"), await place.start("bob")
    place.hosts = ["127.0.0.2"]
    assert await ann.open("bob", PROTO) is None
    place.hosts = ["127.0.0.1"]
    now = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + reached.RETRY_S + 1)
    first = await ann.open("bob", PROTO)
    monkeypatch.undo()
    assert await mirrored(first) == BLOCK
    await bob.stop()
    assert await ann.open("bob", PROTO) is None
    bob = await place.start("bob")
    await ann.introduce("bob", pack({"certificate": bob._certificate}))  # it has dialled, with a new certificate
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK


async def test_a_stream_of_what_nobody_serves_is_not_opened_and_not_counted(place: Place):
    ann, bob = await place.start("ann"), await place.start("bob")
    assert await ann.open("bob", "/p2pllm/1/test/nothing") is None
    await closed(bob)
    assert place.served == [] and place.traffic["bob"].streams == place.traffic["ann"].streams == {}
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK  # it says nothing against the peer


async def test_a_peer_that_never_answers_what_a_stream_is_for_is_not_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    """Else each of its streams would cost the time of a dial, for good."""
    monkeypatch.setattr(direct, "INTRODUCE_S", 0.5)
    monkeypatch.setattr(direct, "DIAL_S", 0.5)
    ann, bob = await place.start("ann"), await place.start("bob")

    async def silent(peer, reader, writer) -> None:
        await reader.read()

    monkeypatch.setattr(bob, "_serve", silent)
    assert await ann.open("bob", PROTO) is None
    assert not ann._reached.may_try("bob")


async def closed(peer: Direct) -> None:
    """Wait until nothing is open that others opened."""
    async with asyncio.timeout(5):
        while peer._open:  # noqa: ASYNC110 - the other side notices at once
            await asyncio.sleep(0.01)


def dial_for_nothing(port: int, name: str, chain: Path, count: int) -> list[ssl.SSLSocket]:
    """Sockets that ask for what nobody serves, and that the client keeps."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(chain)
    made = []
    for _ in range(count):
        made.append(context.wrap_socket(socket.create_connection(("127.0.0.1", port), 5), server_hostname=name))
        with contextlib.suppress(OSError):  # those that are too many may be refused before
            made[-1].sendall(b"\x03/no")
    return made


def descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts descriptors in /proc")
async def test_sockets_that_are_refused_are_closed_at_once_whatever_the_other_side_does(place: Place):
    ann, bob = await place.start("ann"), await place.start("bob")
    await bob.introduce("ann", pack({"certificate": ann._certificate}))
    before = descriptors()
    made = await asyncio.to_thread(dial_for_nothing, bob._port, name_of(ann._certificate), ann._key_file, 60)
    try:
        async with asyncio.timeout(5):  # asyncio would wait 30 s for the other side's goodbye
            while descriptors() > before + len(made):  # noqa: ASYNC110 - it closes them at once
                await asyncio.sleep(0.01)
        assert not bob._open
    finally:
        for sock in made:
            sock.close()


async def test_a_stream_counts_until_its_socket_is_closed(place: Place):
    async def end(peer, reader, writer) -> None:
        await reader.readexactly(1)

    place.handlers["/p2pllm/1/test/end"] = end
    ann, bob = await place.start("ann"), await place.start("bob")
    _, writer = await ann.open("bob", "/p2pllm/1/test/end")
    writer.transport.pause_reading()  # so it does not hear the goodbye
    writer.write(b"x")
    await asyncio.sleep(0.2)
    assert bob._open["ann"] == 1
    writer.transport.abort()
    await closed(bob)


async def test_a_peer_has_a_share_of_the_streams(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "MAX_OPEN_PER_PEER", 2)
    ann, bob = await place.start("ann"), await place.start("bob")
    first = [await ann.open("bob", PROTO) for _ in range(2)]
    for reader, writer in first:
        writer.write(b"x")
        assert await asyncio.wait_for(reader.readexactly(1), 5) == b"x"
    assert await ann.open("bob", PROTO) is None, "p2pd is to carry it"
    for _, other in first:
        other.close()
    await closed(bob)
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK


async def test_strangers_that_say_nothing_give_way(place: Place):
    ann, bob = await place.start("ann"), await place.start("bob")
    strangers = [socket.create_connection(("127.0.0.1", bob._port)) for _ in range(door.MAX_HANDSHAKES)]
    try:
        stream = await ann.open("bob", PROTO)  # behind all of them
        assert stream is not None and await mirrored(stream) == BLOCK
    finally:
        for sock in strangers:
            sock.close()


async def test_little_of_what_a_limited_line_brings_waits_in_the_kernel(place: Place):
    async def give(peer, reader, writer) -> None:
        for at in range(0, 1 << 20, 1 << 16):
            writer.write(BLOCK[at : at + (1 << 16)])
            await writer.drain()

    place.handlers["/p2pllm/1/test/give"] = give
    ann, _ = await place.start("ann"), await place.start("bob")
    place.traffic["ann"].intake.mbit = 16
    streams = [await ann.open("bob", "/p2pllm/1/test/give") for _ in range(3)]
    queued = []

    async def take(reader, writer) -> None:
        while await reader.read(1 << 16):
            queued.append(sum(waiting(other) for _, other in streams))
        writer.close()

    begun = asyncio.get_running_loop().time()
    async with asyncio.timeout(20):
        await asyncio.gather(*(take(*stream) for stream in streams))
    assert asyncio.get_running_loop().time() - begun >= 0.8 * (3 << 20) * 8 / 16e6
    assert 0 < max(queued) <= 3 * 0.1 * 16e6 / 8  # of all three; kernels take what they are told for about half of it


def waiting(writer) -> int:
    """Bytes that a socket has received and nobody has read."""
    if writer.is_closing():
        return 0
    sock = writer.get_extra_info("socket")
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


async def test_a_firewall_that_drops_what_comes_costs_a_bounded_time(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "DIAL_S", 0.2)
    ann, bob = await place.start("ann"), await place.start("bob")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        bob._port = silent.getsockname()[1]
        async with asyncio.timeout(5):
            assert set(await asyncio.gather(*(ann.open("bob", PROTO) for _ in range(8)))) == {None}
    assert ann._reached.pause("bob") == reached.RETRY_S  # once for all of them


async def test_a_slow_dial_says_nothing_against_a_peer_that_others_reached(place: Place):
    ann, bob = await place.start("ann"), await place.start("bob")
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK
    port, bob._port = bob._port, 1  # nobody listens there
    known = ann._known["bob"]
    known.port = 1
    assert await ann.open("bob", PROTO) is None
    bob._port = port
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK


async def test_a_peer_cannot_have_itself_tried_all_the_time(place: Place):
    ann = await place.start("ann")
    asked = []
    for number in range(3):
        made = new_certificate(place.folder / "ann" / f"{number}.pem", "bob")
        (place.folder / "ann" / f"{number}.pem").unlink()
        await ann.introduce("bob", pack({"certificate": made}))
        assert await ann.open("bob", PROTO) is None
        asked.append(place.introductions)
    assert asked == [1, 2, 2], "it is not there, however often it says that it was started anew"


async def test_an_impostor_on_the_port_gets_nothing(place: Place):
    ann, bob, eve = [await place.start(name) for name in ("ann", "bob", "eve")]
    await eve.introduce("ann", pack({"certificate": ann._certificate}))  # she would take the connection
    bob._port = eve._port
    assert await ann.open("bob", PROTO) is None
    assert place.served == []


def dial(port: int, name: str, chain: Path | None) -> bytes:
    """What a TLS client that trusts everybody reads first. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if chain is not None:
        context.load_cert_chain(chain)
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        tls.sendall(bytes([len(PROTO)]) + PROTO.encode() + b"hello")
        return tls.recv(1) and tls.recv(5)


def dial_give_and_end(port: int, name: str, chain: Path, proto: str, data: bytes) -> None:
    """A TLS client that sends and is gone at once, without the goodbyes of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(chain)
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        tls.sendall(bytes([len(proto)]) + proto.encode())
        assert tls.recv(1) == TAKEN
        tls.sendall(data)


async def test_what_came_before_the_end_is_read_in_any_pieces_after_it(place: Place):
    came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def reduce(peer, reader, writer) -> None:
        vigil = Vigil(5.0)
        channel = Channel(reader, writer, vigil.wait("", Want.PULL), vigil.wait("", Want.PUSH))
        await channel.take_over()
        got = bytearray(180_000)
        try:
            await asyncio.sleep(0.3)  # all of it is here by then, and so is the end
            for at in range(0, 180_000, 60_000):
                await channel.receive_into(memoryview(got)[at : at + 60_000])
            with pytest.raises(ConnectionError, match="ended early"):
                await channel.receive_into(memoryview(bytearray(1)))
            came.set_result(bytes(got))
        except BaseException as error:
            came.set_exception(error)
            raise

    place.handlers["/p2pllm/1/test/reduce"] = reduce
    ann, bob = await place.start("ann"), await place.start("bob")
    await bob.introduce("ann", pack({"certificate": ann._certificate}))
    await asyncio.to_thread(
        dial_give_and_end,
        bob._port,
        name_of(ann._certificate),
        ann._key_file,
        "/p2pllm/1/test/reduce",
        BLOCK[:180_000],
    )
    assert await asyncio.wait_for(came, 10) == BLOCK[:180_000]


@pytest.mark.parametrize("case", ["nobody's name", "no certificate", "another one's certificate", "its own"])
async def test_only_who_was_introduced_gets_in_and_only_with_its_own_certificate(place: Place, case: str):
    ann, bob, eve = [await place.start(name) for name in ("ann", "bob", "eve")]
    for name, peer in (("ann", ann), ("eve", eve)):
        await bob.introduce(name, pack({"certificate": peer._certificate}))
    of_ann = name_of(ann._certificate)
    name, chain = {
        "nobody's name": ("unknown", ann._key_file),
        "no certificate": (of_ann, None),
        "another one's certificate": (of_ann, eve._key_file),
        "its own": (of_ann, ann._key_file),
    }[case]
    if case == "its own":
        assert await asyncio.to_thread(dial, bob._port, name, chain) == b"hello"
        assert place.served == ["ann"]
        return
    with contextlib.suppress(OSError):  # with TLS 1.3 a client hears of it only when it reads
        assert await asyncio.to_thread(dial, bob._port, name, chain) == b""
    assert place.served == []


async def test_nobody_takes_the_certificate_of_another(place: Place):
    ann, bob = await place.start("ann"), await place.start("bob")
    await bob.introduce("ann", pack({"certificate": ann._certificate}))
    with pytest.raises(ValueError, match="somebody else"):
        await bob.introduce("eve", pack({"certificate": ann._certificate}))
    made = new_certificate(place.folder / "bob" / "other.pem", "bob")  # before bob has said which is his
    (place.folder / "bob" / "other.pem").unlink()
    with pytest.raises(ValueError, match="somebody else"):
        await ann.introduce("eve", pack({"certificate": made}))


async def test_strangers_cannot_fill_the_memory(place: Place):
    bob = await place.start("bob")
    made = new_certificate(place.folder / "bob" / "other.pem", "ann")
    for number in range(MAX_PEERS + 5):
        bob._callers[str(number)] = (str(number), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    await bob.introduce("ann", pack({"certificate": made}))
    (place.folder / "bob" / "other.pem").unlink()
    assert len(bob._callers) == MAX_PEERS
    assert name_of(made) in bob._callers


@settings(max_examples=500, deadline=None)
@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 2))
def test_a_damaged_certificate_is_refused_or_taken_and_nothing_else(at: int, value: int, cut: int):
    damaged = bytearray(CERTIFICATE)
    damaged[at % len(damaged)] = value
    del damaged[at : at + cut]
    with contextlib.suppress(ValueError):
        assert isinstance(owner_of(bytes(damaged)), str)


@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=300) | st.builds(lambda raw: pack({"certificate": raw}), st.binary(max_size=1200)))
def test_what_is_no_introduction_is_refused(payload: bytes):
    async def none(*_: object) -> list[str]:
        return []

    async def introduced() -> None:
        with tempfile.TemporaryDirectory() as folder:
            peer = Direct("bob", Traffic(), none, none, none)  # type: ignore[arg-type]
            peer._key_file = Path(folder) / "key.pem"
            new_certificate(peer._key_file, "bob")
            with pytest.raises(ValueError):
                await peer.introduce("ann", payload)
            assert peer._callers == {}

    asyncio.run(introduced())


async def test_the_key_is_private_and_goes_with_the_node(place: Place):
    ann = await place.start("ann")
    file = place.folder / "ann" / "direct.pem"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    answer = unpack(await ann.introduce("ann", pack({"certificate": ann._certificate})), 2048)
    assert answer["certificate"] == ann._certificate
    await ann.stop()
    assert not file.exists()
    assert await ann.open("bob", PROTO) is None


async def test_who_is_introduced_to_a_stopped_peer_finds_it_when_it_is_started_again(place: Place):
    ann, bob = await place.start("ann"), await place.start("bob")
    await bob.stop()
    with pytest.raises(ValueError, match="stopped"):
        await bob.introduce("ann", pack({"certificate": ann._certificate}))
    assert not (place.folder / "bob" / "direct.pem").exists()
    await bob.start(place.folder / "bob", "127.0.0.1", 0)
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK


async def test_peers_meet_after_somebody_has_tidied_up(place: Place):
    ann, _ = await place.start("ann"), await place.start("bob")
    for name in ("ann", "bob"):
        shutil.rmtree(place.folder / name)
    assert await mirrored(await ann.open("bob", PROTO)) == BLOCK
    assert stat.S_IMODE((place.folder / "ann" / "direct.pem").stat().st_mode) == 0o600


def test_a_peer_does_not_have_us_dial_into_our_own_networks():
    def tcp(host: str) -> str:
        return f"/ip4/{host}/tcp/4001"

    said = [tcp("192.168.1.1"), tcp("8.8.8.8"), tcp("127.0.0.1"), tcp("169.254.169.254")]
    relayed = tcp("9.9.9.9") + "/p2p/12D3KooWA/p2p-circuit"
    assert hosts_of([tcp("10.0.0.7"), relayed], said) == ["10.0.0.7"], "it is there, as its connection shows"
    assert hosts_of([relayed], said) == ["8.8.8.8"]


async def test_a_port_that_is_taken_is_named(place: Place, tmp_path: Path):
    ann = await place.start("ann")
    other = Direct("bob", Traffic(), *[None] * 3)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=rf"port {ann._port} .*direct_port"):
        await other.start(tmp_path, "127.0.0.1", ann._port)
    assert not (tmp_path / "direct.pem").exists()
