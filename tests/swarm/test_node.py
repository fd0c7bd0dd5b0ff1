"""Nodes over real p2pd processes on loopback: calls, streams, restarts, deaths, the directory, membership."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from polling import lives

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.identity import Identity
from p2pllm.network import supervisor
from p2pllm.network.bulk import Blob, BulkServer, fetch
from p2pllm.network.introduction import METHOD as DIRECT
from p2pllm.network.membership import Membership
from p2pllm.network.messages import pack
from p2pllm.network.node import Node, NodeSettings
from p2pllm.network.options import P2pdOptions, Reach
from p2pllm.network.transport import MAX_CALL_BYTES

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]

RUN = "5a" * 32
MIB = 1 << 20


def p2pds() -> list[psutil.Process]:
    """The p2pd processes that this process started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if "p2pd" in child.name():
                found.append(child)
    return found


async def until(condition, limit: float) -> float:
    """Poll; the seconds that it took. Fails after `limit` seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"not within {limit} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


@pytest.fixture
def folder():
    """Short, because of the sockets; pytest's own folders are too deep on some systems."""
    with tempfile.TemporaryDirectory(prefix="p2pllm-") as path:
        yield Path(path)


@pytest.fixture
async def start(folder):
    """Starts node 0, 1, ...; afterwards no process and no socket may be left."""
    nodes = []

    async def make(**settings) -> Node:
        number = len(nodes)
        identity = Identity.load_or_create(folder / f"key{number}")
        node = await Node.start(identity, RUN, folder / f"run{number}", NodeSettings(**settings))
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        began = time.monotonic()
        await node.stop()
        assert time.monotonic() - began < 3
    assert p2pds() == []
    assert [path for run in folder.glob("run*") for path in run.iterdir()] == []


@pytest.fixture
async def pair(start):
    ann, bob = await start(), await start()
    assert await ann.connect(bob.addresses()[0]) == bob.peer_id
    bob.learn(ann.peer_id, ann.addresses())
    return ann, bob


async def echo(peer: str, payload: bytes) -> bytes:
    return peer.encode() + payload


async def test_a_limited_upload_slows_bulk_and_not_calls(start):
    """A blob takes as long as its bytes do at the rate; small calls beside it do not queue behind it."""
    ann, bob = await start(upload_mbit=8.0), await start()
    assert await bob.connect(ann.addresses()[0]) == ann.peer_id
    await ann.serve_call("echo", echo)

    async def source(request):
        return Blob({}, [bytes(2_000_000)])

    await BulkServer(ann, source).start()
    began = time.monotonic()
    fetching = asyncio.create_task(fetch(bob, ann.peer_id, {}, 2_000_000))
    waits = []
    while not fetching.done():
        asked = time.monotonic()
        await bob.call(ann.peer_id, "echo", b"", 5)
        waits.append(time.monotonic() - asked)
    assert len((await fetching)[1]) == 2_000_000
    took = time.monotonic() - began
    assert took > 1.6, "2 s but for what may go in one burst"
    assert sorted(waits)[len(waits) // 2] < took / 10


async def test_calls_and_their_errors(pair):
    ann, bob = pair

    async def fails(peer, payload):
        raise RuntimeError("broken inside")

    async def slow(peer, payload):
        await asyncio.Event().wait()

    async def large(peer, payload):
        return bytes(int(payload))

    for method, handler in {"echo": echo, "fails": fails, "slow": slow, "large": large}.items():
        await bob.serve_call(method, handler)
    assert await ann.call(bob.peer_id, "echo", b"hi", 5) == ann.peer_id.encode() + b"hi"
    assert len(await ann.call(bob.peer_id, "large", b"%d" % MAX_CALL_BYTES, 5)) == MAX_CALL_BYTES
    assert len(await ann.call(bob.peer_id, "echo", bytes(MAX_CALL_BYTES - 100), 5)) == MAX_CALL_BYTES - 100 + 52
    with pytest.raises(NetworkError, match="broken inside"):
        await ann.call(bob.peer_id, "fails", b"", 5)
    with pytest.raises(NetworkError, match=r"did not answer slow within 0\.2 s"):
        await ann.call(bob.peer_id, "slow", b"", 0.2)
    with pytest.raises(NetworkError, match="does not offer"):
        await ann.call(bob.peer_id, "missing", b"", 5)
    with pytest.raises(NetworkError, match="are allowed"):
        await ann.call(bob.peer_id, "echo", bytes(MAX_CALL_BYTES + 1), 5)
    with pytest.raises(NetworkError, match="bytes"):
        await ann.call(bob.peer_id, "large", b"%d" % (MAX_CALL_BYTES + 1), 5)
    with pytest.raises(NetworkError, match="not the id"):
        await ann.call("nobody", "echo", b"", 5)
    with pytest.raises(UnreachableError):
        await ann.call(Identity.generate().peer_id, "echo", b"", 5)
    assert await ann.call(bob.peer_id, "echo", b"", 5) == ann.peer_id.encode()
    assert ann.traffic.calls.sent > 0 and ann.traffic.calls.received > MAX_CALL_BYTES


async def test_many_cancelled_calls_do_not_disturb(pair):
    ann, bob = pair
    await bob.serve_call("echo", echo)
    for number in range(300):
        task = asyncio.create_task(ann.call(bob.peer_id, "echo", b"x", 5))
        await asyncio.sleep((number % 30) / 10_000)  # cancelled at every stage, replies on their way among them
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert await ann.call(bob.peer_id, "echo", b"x", 5) == ann.peer_id.encode() + b"x"
    assert ann.restarts == bob.restarts == 0


async def test_streams_both_ways(pair):
    ann, bob = pair
    block = os.urandom(MIB)

    async def mirror(peer, reader, writer):
        for _ in range(32):
            writer.write(await reader.readexactly(MIB))
            await writer.drain()

    await bob.serve_stream("mirror", mirror)
    reader, writer = await ann.open_stream(bob.peer_id, "mirror")

    async def send():
        for _ in range(32):
            writer.write(block)
            await writer.drain()

    sending = asyncio.create_task(send())
    for _ in range(32):
        assert await reader.readexactly(MIB) == block
    assert await reader.read() == b""
    await sending
    writer.close()
    for node in pair:
        traffic = node.traffic
        assert traffic.sent - traffic.calls.sent == traffic.received - traffic.calls.received == 32 * MIB
    with pytest.raises(NetworkError, match="does not offer"):
        await ann.open_stream(bob.peer_id, "missing")


async def test_much_goes_directly_and_over_p2pd_where_nobody_answers(pair):
    ann, bob = pair
    block = os.urandom(MIB)

    async def mirror(peer, reader, writer):
        assert peer == ann.peer_id
        writer.write(await reader.readexactly(MIB))
        await writer.drain()

    async def is_direct() -> bool:
        reader, writer = await ann.open_stream(bob.peer_id, "mirror", MIB)
        writer.write(block)
        assert await reader.readexactly(MIB) == block
        tls = writer.get_extra_info("ssl_object")
        writer.close()
        return tls is not None

    await bob.serve_stream("mirror", mirror)
    assert await is_direct()
    await bob._direct.stop()
    assert not await is_direct()
    await bob._direct.start(bob._direct._key_file.parent, "127.0.0.1", 0)
    await bob.call(ann.peer_id, DIRECT, pack({"certificate": bob._direct._certificate}), 5)
    assert await is_direct()  # it is there again, as its introduction says


async def test_killed_p2pd_returns_as_the_same_peer(pair):
    ann, bob = pair
    await ann.serve_call("echo", echo)
    await bob.serve_call("echo", echo)

    async def mirror(peer, reader, writer):
        writer.write(await reader.readexactly(5))

    await bob.serve_stream("mirror", mirror)
    addresses = bob.addresses()
    await bob.call(ann.peer_id, "echo", b"", 5)
    os.kill(bob._supervisor.pid, signal.SIGKILL)
    await until(lambda: bob.restarts == 1, 10)
    assert bob.addresses() == addresses
    assert await bob.call(ann.peer_id, "echo", b"", 5)

    await bob.call(ann.peer_id, "echo", b"", 5)  # bob dials; ann's p2pd refuses to for some seconds
    assert await ann.call(bob.peer_id, "echo", b"", 5)
    reader, writer = await ann.open_stream(bob.peer_id, "mirror")
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    writer.close()


async def test_hung_p2pd_is_replaced_and_calls_in_flight_fail(pair, monkeypatch):
    monkeypatch.setattr(supervisor, "_PROBE_TIMEOUT_S", 1.0)
    ann, bob = pair
    await bob.serve_call("echo", echo)
    os.kill(ann._supervisor.pid, signal.SIGSTOP)
    with pytest.raises(NetworkError, match="p2pd has stopped"):
        await ann.call(bob.peer_id, "echo", b"", 30)
    assert await ann.call(bob.peer_id, "echo", b"", 20) == ann.peer_id.encode()
    assert ann.restarts == 1


async def test_port_that_is_taken(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NetworkError, match=f"Port {port} "):
            await start(listen_port=port)


async def test_lost_port_of_ones_own_choice_is_fatal(start, monkeypatch):
    monkeypatch.setattr(supervisor, "_RESTART_DELAYS_S", (0.0, 0.01, 0.02))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    node = await start(listen_port=port)
    (p2pd,) = p2pds()
    p2pd.kill()
    with contextlib.suppress(psutil.Error):
        p2pd.wait(5)  # without giving way to the node, which would restart it
    with socket.create_server(("127.0.0.1", port)):
        error = await asyncio.wait_for(asyncio.shield(node.failed), 30)
        assert f"Port {port} " in str(error)
        with pytest.raises(NetworkError, match="cannot be restarted"):
            await node.call(Identity.generate().peer_id, "echo", b"", 5)


async def test_connect_any(pair, start):
    ann, bob = pair
    carl = await start()
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{ann.peer_id}"
    wrong = bob.addresses()[0].replace(bob.peer_id, Identity.generate().peer_id)
    assert await carl.connect_any([dead, wrong, *bob.addresses()]) == bob.peer_id
    dora = await start()  # carl's p2pd would only say that it has just tried
    with pytest.raises(UnreachableError) as caught:
        await dora.connect_any([dead, wrong, "nonsense"])
    for tried in (dead, wrong, "nonsense", "refused", "another peer"):
        assert tried in str(caught.value)


async def test_all_interfaces_with_loopback_last(start):
    node = await start(listen_host="0.0.0.0")
    addresses = node.addresses()
    assert addresses[-1].startswith("/ip4/127.0.0.1/tcp/")
    assert all(address.endswith(f"/p2p/{node.peer_id}") for address in addresses)


DAEMON = """
import asyncio, sys
from pathlib import Path
from p2pllm.identity import Identity
from p2pllm.network.node import Node, NodeSettings

async def main(folder):
    node = await Node.start(Identity.load_or_create(folder / "key"), "5a" * 32, folder / "run", NodeSettings())
    print(node._supervisor.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_killed_daemon_leaves_no_p2pd_and_sockets_that_do_not_matter(folder):
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(folder), stdout=asyncio.subprocess.PIPE
    )
    p2pd = psutil.Process(int(await asyncio.wait_for(daemon.stdout.readline(), 60)))
    assert "p2pd" in p2pd.name()
    daemon.kill()
    await daemon.wait()
    await until(lambda: not lives(p2pd), 5)
    assert list((folder / "run").iterdir())
    node = await Node.start(Identity.load_or_create(folder / "key"), RUN, folder / "run", NodeSettings())
    await node.stop()
    assert not list((folder / "run").iterdir())


async def test_directory(start):
    nodes = [await start() for _ in range(3)]
    for node in nodes[1:]:
        await node.connect_any(nodes[0].addresses())
    for node in nodes:
        assert await node.directory.announce()

    async def seen(node):
        return {record.peer: record.addresses for record in await node.directory.members()}

    everybody = {node.peer_id: tuple(node.addresses()) for node in nodes}
    # what a node holds already is handed on to newcomers in the background
    for node in nodes:
        for _ in range(100):
            if (found := await seen(node)) == everybody:
                break
            await asyncio.sleep(0.1)
        assert found == everybody


class Daemon:
    """A node and its membership."""

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        self.heard: dict[str, bytes] = {}
        self.membership = Membership(
            node,
            status=lambda: b"status %d" % number,
            on_status=self.heard.__setitem__,
            addresses=node.addresses,
            directory=node.directory,
        )


async def test_membership_notices_arrival_restart_death_and_leaving(start, caplog):
    daemons = [Daemon(await start(), number) for number in range(4)]
    for daemon in daemons:
        await daemon.membership.start(daemons[0].node.addresses())
    everybody = {daemon.node.peer_id for daemon in daemons}
    for daemon in daemons:
        await until(lambda d=daemon: d.membership.alive() == everybody - {d.node.peer_id}, 10)
        await until(lambda d=daemon: set(d.heard) == everybody - {d.node.peer_id}, 5)
    first, second, third, fourth = daemons

    os.kill(second.node._supervisor.pid, signal.SIGKILL)  # restarted: all see it again
    await until(lambda: second.node.restarts == 1, 10)
    await until(lambda: second.node.peer_id in first.membership.alive(), 10)

    third.node._supervisor._watch.cancel()  # dies for good, without a word
    os.kill(third.node._supervisor.pid, signal.SIGKILL)
    took = await until(lambda: third.node.peer_id not in first.membership.alive(), 10)
    logging.getLogger(__name__).info("a killed peer was noticed after %.2f s", took)

    await fourth.membership.stop()
    await until(lambda: fourth.node.peer_id not in first.membership.known(), 2)
    for daemon in (first, second, third):
        await daemon.membership.stop()


async def test_who_can_be_dialled_relays_as_much_as_it_was_told_to(folder):
    """p2pd makes its relay twice; that of libp2p's own limits, 128 KiB, must not be what answers."""
    nodes: list[Node] = []

    async def make(reach: Reach) -> Node:
        key, place = folder / f"key{len(nodes)}", folder / f"run{len(nodes)}"
        identity = Identity.load_or_create(key)
        nodes.append(node := Node(identity, RUN, P2pdOptions(key, place, "127.0.0.1", nat=False, reach=reach)))
        await node._supervisor.start(None)
        return node

    try:
        asking = await make(Reach.PRIVATE)
        for _ in range(4):  # half of all starts go wrong
            relay = await make(Reach.PUBLIC)
            assert await asking.connect(relay.addresses()[0]) == relay.peer_id
            assert await asking.carries(relay.peer_id) == 1 << 40
            assert relay.restarts == 0
        assert await relay.carries(asking.peer_id) == 1 << 17, "who does not mean to relay gives next to nothing"
        before = asking._supervisor.pid
        asking.change_reach(Reach.PUBLIC)
        await until(lambda: asking._supervisor.pid not in (before, None), 20)
        await asking._supervisor.up()
        assert await relay.carries(asking.peer_id) == 1 << 40
        assert asking.restarts == 0, "p2pd was started anew as it was told to, not because it died"
    finally:
        for node in nodes:
            await node.stop()
    assert p2pds() == []
