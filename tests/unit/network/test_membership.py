"""Membership over a network in memory: who finds whom, and how soon somebody's end is known."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.network.beat import MAX_HINTS, MAX_STATUS_BYTES, Beat
from p2pllm.network.membership import Membership
from p2pllm.network.messages import pack
from p2pllm.network.saved import load_peers, save_peers
from p2pllm.network.table import ALIVE_S
from p2pllm.testing import MemoryNetwork, peer_number, virtual


class Board:
    """A directory of one look at a time."""

    def __init__(self):
        self.records, self.looks = [], 0

    async def members(self):
        self.looks += 1
        return self.records

    def pin(self, host):
        self.records.append(SimpleNamespace(peer=host.peer_id, addresses=(host.address,), status=b""))


class Swarm:
    """Some members that know the first one, on hosts that reach only whose address they have learnt."""

    def __init__(self, count, tmp_path=None, board=None):
        self.board = board
        self.network = MemoryNetwork(needs_addresses=True)
        self.hosts = [self.network.host(number) for number in range(count)]
        self.heard = [{} for _ in self.hosts]
        self.status = [b"status %d" % number for number in range(count)]
        self.folder = tmp_path
        self.members = [self.member(n) for n in range(count)]

    def member(self, n):
        host = self.hosts[n]
        return Membership(
            host,
            status=lambda: self.status[n],
            on_status=self.heard[n].__setitem__,
            addresses=lambda: [host.address],
            directory=self.board,
            saved=self.folder / f"peers{n}.json" if self.folder else None,
            clock=asyncio.get_running_loop().time,
        )

    async def begin(self, n, *bootstrap):
        await self.hosts[n].spawn(self.members[n].start(bootstrap))

    async def start(self):
        """All begin, and have time to find each other."""
        for n in range(len(self.hosts)):
            await self.begin(n, *[self.hosts[0].address][:n])
        await asyncio.sleep(2)
        return self

    async def restart(self, n):
        """The killed member as it comes back."""
        self.hosts[n] = self.network.host(n)
        self.members[n] = self.member(n)
        await self.begin(n, self.hosts[0].address)

    def alive(self, n):
        return {self.hosts.index(self.network.hosts[peer]) for peer in self.members[n].alive()}


@virtual
async def test_all_find_each_other_through_one():
    swarm = await Swarm(4).start()
    for n in range(4):
        assert swarm.alive(n) == {0, 1, 2, 3} - {n}
        assert {peer: bytes(s) for peer, s in swarm.heard[n].items()} == {
            swarm.hosts[m].peer_id: swarm.status[m] for m in range(4) if m != n
        }


@virtual
async def test_killed_peer_is_dead_within_two_seconds_and_returns():
    swarm = await Swarm(4).start()
    swarm.hosts[2].kill()
    await asyncio.sleep(2)
    assert swarm.alive(0) == {1, 3}
    await swarm.restart(2)
    await asyncio.sleep(2)  # it calls us, long before our own next attempt must come
    assert swarm.alive(0) == {1, 2, 3}


@virtual
async def test_frozen_peer_is_dead_within_six_seconds():
    swarm = await Swarm(4).start()
    swarm.hosts[2].freeze()
    await asyncio.sleep(3)
    assert swarm.alive(0) == {1, 2, 3}
    await asyncio.sleep(3)
    assert swarm.alive(0) == {1, 3}


@virtual
async def test_frozen_peer_that_goes_on_blames_nobody_for_the_time_that_it_missed():
    swarm = await Swarm(4).start()
    swarm.hosts[2].freeze()
    await asyncio.sleep(60)
    assert swarm.alive(2) == set()  # as its clock says, but it does not look
    swarm.hosts[2].thaw()
    await asyncio.sleep(0.1)
    assert swarm.alive(2) == {0, 1, 3}
    await asyncio.sleep(2)
    assert swarm.alive(0) == {1, 2, 3}


@virtual
async def test_traffic_is_one_call_a_second_and_pair():
    swarm = await Swarm(4).start()

    def messages():
        return sum(host.sent["beat"].messages for host in swarm.hosts)  # requests and replies

    before = messages()
    await asyncio.sleep(10)
    assert 2 * 6 * 8 <= messages() - before <= 2 * 6 * 12  # 6 pairs


@virtual
async def test_push_brings_a_new_status_at_once():
    swarm = await Swarm(4).start()
    swarm.status[0] = b"new"
    swarm.members[0].push()
    await asyncio.sleep(0.2)
    assert all(swarm.heard[n][swarm.hosts[0].peer_id] == b"new" for n in (1, 2, 3))


@virtual
async def test_the_directory_is_looked_through_seldom_but_soon_by_who_is_alone():
    board = Board()
    swarm = Swarm(3, board=board)
    for n in (0, 1):
        await swarm.begin(n, swarm.hosts[0].address)
    await asyncio.sleep(110)
    assert swarm.alive(0) == {1} and board.looks <= 4
    await swarm.begin(2)  # knows nobody, and nobody knows it
    board.pin(swarm.hosts[2])
    await asyncio.sleep(1)
    swarm.hosts[1].kill()
    await asyncio.sleep(9)  # 2 s until it is dead, 5 s until the next look
    assert swarm.alive(0) == {2}


@virtual
async def test_leaving_is_known_at_once():
    swarm = await Swarm(4).start()
    await swarm.members[1].stop()
    assert swarm.alive(0) == {2, 3}
    swarm.hosts[1].kill()
    await asyncio.sleep(5)
    assert swarm.alive(0) == {2, 3}


@virtual
async def test_wait_changed():
    swarm = await Swarm(4).start()
    seen = swarm.members[0].alive()
    waiting = asyncio.create_task(swarm.members[0].wait_changed(seen))
    await asyncio.sleep(0)
    assert not waiting.done()
    swarm.hosts[2].kill()
    await asyncio.sleep(2)
    assert waiting.done() and waiting.result() == seen - {swarm.hosts[2].peer_id}


@virtual
async def test_hostile_beats_change_nothing():
    swarm = await Swarm(4).start()
    evil = swarm.network.host(99)
    evil.learn(swarm.hosts[0].peer_id, [swarm.hosts[0].address])
    for payload in (
        b"",
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        pack([1, b"", [], [[1, 2]]]),
        pack([2, b"", [], []]),
        bytes(1 << 17),
    ):
        with pytest.raises(Exception, match="malformed"):
            await evil.call(swarm.hosts[0].peer_id, "beat", payload, 1)
    await asyncio.sleep(1)
    assert swarm.alive(0) == {1, 2, 3}


@virtual
async def test_status_that_its_owner_cannot_use():
    swarm = await Swarm(4).start()

    def broken(peer, status):
        raise ValueError("bad status")

    swarm.members[0]._on_status = broken
    await asyncio.sleep(10)
    assert swarm.alive(0) == {1, 2, 3}


@virtual
async def test_former_peers_are_found_without_the_founder(tmp_path):
    swarm = await Swarm(3, tmp_path).start()
    for member in swarm.members:
        await member.stop()
    later = Swarm(3, tmp_path)
    later.hosts[0].kill()
    for n in (1, 2):
        await later.begin(n)
    await asyncio.sleep(2)
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


@virtual
async def test_beats_of_many_members_stay_bounded_and_the_dead_are_noticed(monkeypatch):
    monkeypatch.setattr("p2pllm.network.table.BEATS_A_SECOND", 16)
    swarm = await Swarm(40).start()
    await asyncio.sleep(5)
    before = [host.sent["beat"].messages for host in swarm.hosts]
    for member in swarm.members:
        member.push()
    await asyncio.sleep(5)
    sent = [host.sent["beat"].messages - was for host, was in zip(swarm.hosts, before, strict=True)]
    assert max(sent) < 5 * 2 * 16  # those it began and those it answered
    assert all(len(swarm.alive(n)) == 39 for n in range(40))
    swarm.hosts[7].kill()
    swarm.hosts[8].freeze()
    await asyncio.sleep(2 * ALIVE_S * 40 / 16)
    assert not {7, 8} & swarm.alive(0)


@virtual
async def test_one_for_whom_there_is_no_room_knows_that(monkeypatch):
    monkeypatch.setattr("p2pllm.network.table.MAX_MEMBERS", 3)
    swarm = await Swarm(5).start()
    outside = [n for n in range(5) if not swarm.alive(n)]
    assert outside == [4]
    assert swarm.members[4].is_turned_away()
    assert not any(swarm.members[n].is_turned_away() for n in range(4))
    swarm.hosts[2].kill()
    await asyncio.sleep(60)
    assert swarm.alive(4) == {0, 1, 3}
    assert not swarm.members[4].is_turned_away()
