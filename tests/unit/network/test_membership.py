"""Membership over a network in memory, on a clock that only the test moves."""

import asyncio
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from member_network import MemoryNetwork, peer_number

from p2pllm.network.beat import MAX_HINTS, MAX_STATUS_BYTES, Beat
from p2pllm.network.membership import Membership
from p2pllm.network.messages import pack
from p2pllm.network.saved import load_peers, save_peers


class Swarm:
    """Some members; `run` moves the clock and lets them tick."""

    def __init__(self, count, tmp_path=None):
        self.network = MemoryNetwork()
        self.transports = [self.network.host(number) for number in range(1, count + 1)]
        self.heard = [{} for _ in self.transports]
        self.status = [b"status %d" % number for number in range(count)]
        self.members = [
            Membership(
                transport,
                status=lambda n=n: self.status[n],
                on_status=self.heard[n].__setitem__,
                addresses=lambda t=transport: [t.address],
                saved=tmp_path / f"peers{n}.json" if tmp_path else None,
                clock=lambda: self.network.now,
            )
            for n, transport in enumerate(self.transports)
        ]

    async def start(self):
        for n, member in enumerate(self.members):
            await member._transport.serve_call("beat", member._answer_beat)
            await member._transport.serve_call("leave", member._answer_leave)
            if n:
                member.add([self.transports[0].address])

    async def run(self, seconds):
        for _ in range(round(seconds * 10)):
            self.network.now += 0.1
            for transport, member in zip(self.transports, self.members, strict=True):
                if transport.peer_id not in self.network.down | self.network.frozen:
                    member.tick()
            for _ in range(6):
                await asyncio.sleep(0)

    def alive(self, n):
        return {self.transports.index(self.network.hosts[peer]) for peer in self.members[n].alive()}


@pytest.fixture
async def swarm():
    made = Swarm(4)
    await made.start()
    await made.run(2)
    return made


async def test_all_find_each_other_through_one(swarm):
    for n in range(4):
        assert swarm.alive(n) == {0, 1, 2, 3} - {n}
        assert {peer: bytes(s) for peer, s in swarm.heard[n].items()} == {
            swarm.transports[m].peer_id: swarm.status[m] for m in range(4) if m != n
        }


async def test_killed_peer_is_dead_within_two_seconds_and_returns(swarm):
    swarm.network.down.add(swarm.transports[2].peer_id)
    await swarm.run(2)
    assert swarm.alive(0) == {1, 3}
    swarm.network.down.clear()
    await swarm.run(2)  # it calls us, long before our own next attempt must come
    assert swarm.alive(0) == {1, 2, 3}


async def test_frozen_peer_is_dead_within_six_seconds(swarm):
    swarm.network.frozen.add(swarm.transports[2].peer_id)
    await swarm.run(3)
    assert swarm.alive(0) == {1, 2, 3}
    await swarm.run(3)
    assert swarm.alive(0) == {1, 3}


async def test_traffic_is_one_call_a_second_and_pair(swarm):
    swarm.network.calls.clear()
    await swarm.run(10)
    assert 6 * 8 <= len(swarm.network.calls) <= 6 * 12  # 6 pairs


async def test_push_brings_a_new_status_at_once(swarm):
    swarm.status[0] = b"new"
    swarm.members[0].push()
    await swarm.run(0.2)
    assert all(swarm.heard[n][swarm.transports[0].peer_id] == b"new" for n in (1, 2, 3))


async def test_leaving_is_known_at_once(swarm):
    await swarm.members[1].stop()
    assert swarm.alive(0) == {2, 3}
    swarm.network.down.add(swarm.transports[1].peer_id)
    await swarm.run(5)
    assert swarm.alive(0) == {2, 3}


async def test_wait_changed(swarm):
    seen = swarm.members[0].alive()
    waiting = asyncio.create_task(swarm.members[0].wait_changed(seen))
    await asyncio.sleep(0)
    assert not waiting.done()
    swarm.network.down.add(swarm.transports[2].peer_id)
    await swarm.run(2)
    assert waiting.done() and waiting.result() == seen - {swarm.transports[2].peer_id}


async def test_hostile_beats_change_nothing(swarm):
    evil = swarm.network.host(99)
    evil.learn(swarm.transports[0].peer_id, [swarm.transports[0].address])
    for payload in (
        b"",
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        pack([1, b"", [], [[1, 2]]]),
        pack([2, b"", [], []]),
        bytes(1 << 17),
    ):
        with pytest.raises(Exception, match="malformed"):
            await evil.call(swarm.transports[0].peer_id, "beat", payload, 1)
    await swarm.run(1)
    assert swarm.alive(0) == {1, 2, 3}


async def test_status_that_its_owner_cannot_use(swarm):
    def broken(peer, status):
        raise ValueError("bad status")

    swarm.members[0]._on_status = broken
    await swarm.run(10)
    assert swarm.alive(0) == {1, 2, 3}


async def test_former_peers_are_found_without_the_founder(tmp_path):
    swarm = Swarm(3, tmp_path)
    await swarm.start()
    await swarm.run(2)
    for member in swarm.members:
        await member.stop()
    later = Swarm(3, tmp_path)
    later.network.down.add(later.transports[0].peer_id)
    for member in later.members[1:]:
        await member.start()
    await later.run(2)
    assert later.alive(1) == {2} and later.alive(2) == {1}
    for member in later.members[1:]:
        await member.stop()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "[" * 100_000, json.dumps({peer_number(5): 3})])
def test_damaged_file_of_peers_is_ignored(tmp_path, text):
    path = tmp_path / "peers.json"
    path.write_text(text)
    assert load_peers(path) == {}


def test_file_of_peers_is_bounded(tmp_path):
    path = tmp_path / "peers.json"
    save_peers(path, {peer_number(n): [f"/ip4/10.0.0.1/tcp/1/p2p/{peer_number(n)}"] for n in range(1, 200)})
    assert len(load_peers(path)) == 64
    assert [entry.name for entry in tmp_path.iterdir()] == ["peers.json"]


def test_beat_round_trip_and_bounds():
    beat = Beat(b"x" * MAX_STATUS_BYTES, ("/a",), {peer_number(1): ("/b",)})
    assert Beat.decode(beat.encode()) == beat
    many = Beat(b"", (), {peer_number(n): () for n in range(1, 200)})
    assert len(Beat.decode(many.encode()).hints) == MAX_HINTS
    with pytest.raises(ValueError, match="4096"):
        Beat(b"x" * (MAX_STATUS_BYTES + 1)).encode()


plain = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=8) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(
    st.one_of(
        st.binary(max_size=200),
        plain.map(pack),
        st.lists(plain, min_size=4, max_size=4).map(lambda x: pack([1, *x[1:]])),
    )
)
def test_beats_of_strangers_never_raise_otherwise(data):
    with contextlib.suppress(ValueError):
        Beat.decode(data)
