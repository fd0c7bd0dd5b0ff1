"""Targets: beats of other members, their records in the DHT, and what relays answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgpack
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.routing import DHTID

from fuzzing.promise import check, parts_of, target
from p2pllm.errors import NetworkError
from p2pllm.network import dht
from p2pllm.network.beat import MAX_BEAT_BYTES, MAX_HINTS, MAX_STATUS_BYTES, Beat
from p2pllm.network.dht import MemberRecord, MemberValidator
from p2pllm.network.membership import Membership
from p2pllm.network.messages import pack
from p2pllm.network.relays import granted
from p2pllm.testing import MemoryNetwork, identity_number, peer_number, run

RUN = "5a" * 32
NOW = 1_700_000_000.0
KEY = DHTID.generate(source=dht.directory_key(RUN)).to_bytes()
ADDRESS = "/ip4/192.0.2.1/tcp/4001"
STRANGER = 1

UNFILLED = 96 << 20
"""What msgpack takes for lists that say that they are long, each in another one, before it finds that they end."""

# -- relays ------------------------------------------------------------------------------------------------------------


def _grants() -> list[bytes]:
    limits = [b"", b"\x08\x78", b"\x08\x78\x10\x80\x80\x08"]
    reserved = b"\x08\x02\x1a\x06\x08\x80\x88\xc4\xd3\x06"
    return [reserved + b"\x22" + bytes([len(each)]) + each + b"\x28\x64" for each in limits]


@target(_grants, max_bytes=1 << 14, memory=1 << 20)
def grant(data: bytes) -> bool:
    """What a peer answers who is asked to relay."""
    try:
        found = granted(data)
    except ValueError:
        return False
    check(0 <= found < 1 << 70, "a number of bytes that is none")
    return True


# -- beat --------------------------------------------------------------------------------------------------------------


def _beats() -> list[bytes]:
    others = [peer_number(number) for number in range(2, 2 + MAX_HINTS)]
    hints: dict[str, tuple[str, ...]] = {other: (f"{ADDRESS}/p2p/{other}",) for other in others}
    beats = [Beat(b""), Beat(bytes(MAX_STATUS_BYTES)), Beat(b"status", (ADDRESS,)), Beat(b"status", (ADDRESS,), hints)]
    return [beat.encode() for beat in beats]


@target(_beats, max_bytes=MAX_BEAT_BYTES + 64, memory=UNFILLED)
def beat(data: bytes) -> bool:
    """A stranger's beat, as a call and as the reply to ours, and what membership makes of it. Memory: 96 MiB."""
    try:
        found = Beat.decode(data)
    except ValueError:
        run(_beaten(data, 0))
        return False
    check(len(found.hints) <= MAX_HINTS and len(found.status) <= MAX_STATUS_BYTES, "a beat that is too long")
    check(Beat.decode(found.encode()) == found, "another beat when it is encoded again")
    run(_beaten(data, len(found.hints)))
    return True


async def _beaten(data: bytes, hints: int) -> None:
    """A member that gets this beat goes on, and knows nobody but the stranger and whom it tells of."""
    network = MemoryNetwork()
    ours, stranger = network.host(0), network.host(STRANGER)
    member = Membership(
        ours,
        status=lambda: b"ours",
        on_status=lambda peer, status: None,
        addresses=lambda: [ours.address],
        clock=asyncio.get_running_loop().time,
    )
    await ours.spawn(member.start())

    async def reply(peer: str, payload: bytes) -> bytes:
        return data

    await stranger.serve_call("beat", reply)
    with suppress(NetworkError):
        await ours.calls["beat"](stranger.peer_id, data)
    await asyncio.sleep(1.5)  # a beat of ours and its reply
    check(member.alive() <= {stranger.peer_id}, "somebody lives that was never heard")
    check(len(member.known()) <= 1 + hints, "more members than were told of")
    await member.stop()


# -- member ------------------------------------------------------------------------------------------------------------


def _members() -> list[bytes]:
    addresses = [f"/ip4/10.0.0.{at}/tcp/{at}" for at in range(1, 9)]
    records = [
        MemberRecord.sign(identity_number(STRANGER), RUN, addresses[:many], NOW, status)
        for many, status in [(0, b""), (1, bytes(dht.MAX_STATUS_BYTES)), (8, b"status")]
    ]
    fields = [[list(each.addresses), each.status, each.issued] for each in records]
    return [*(each.encode() for each in records), *map(msgpack.packb, fields)]


@target(_members, max_bytes=dht.MAX_RECORD_BYTES + 64, memory=8 << 20)
def member(data: bytes) -> bool:
    """A record of a member in the DHT. An input of three fields is signed first, as a member may sign anything.

    Memory: 8 MiB.
    """
    data = _signed(data)
    try:
        found = MemberRecord.decode(data, RUN)
    except ValueError:
        found = None
    owner = found.peer if found else peer_number(STRANGER)
    until = found.issued + dht.RECORD_SECONDS if found else NOW + dht.RECORD_SECONDS
    stored = DHTRecord(KEY, pack(owner), pack(data), until)
    bare = DHTRecord(KEY, pack(owner), data, until)
    validator = MemberValidator(RUN, lambda: NOW)
    check(found is not None or not validator.validate(stored), "a record is stored that cannot be read")
    validator.validate(bare)
    return found is not None


def _signed(data: bytes) -> bytes:
    try:
        addresses, status, issued = parts_of(data)
        identity = identity_number(STRANGER)
        body = pack([RUN, identity.peer_id, addresses, status, issued])
        return pack([identity.peer_id, addresses, status, issued, identity.sign("member-record", body)])
    except (ValueError, TypeError, OverflowError):  # anything that is not three fields is a record as it is
        return data
