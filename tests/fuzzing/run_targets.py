"""Targets: what a newcomer is given to find, understand and take up a run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack

from fuzzing.promise import check, parts_of, target
from p2pllm import invite as invites
from p2pllm.errors import InviteError, ManifestError, StateError
from p2pllm.invite import MAX_ADDRESS_BYTES, MAX_ADDRESSES, Invite
from p2pllm.manifest import MAX_MANIFEST_BYTES, RunManifest
from p2pllm.state import ChunkPlan, SnapshotStore
from p2pllm.testing import LAYOUT, make_manifest, make_state, peer_number

RUN = "5a" * 32
RECORD = bytes(range(32))

# -- invite ------------------------------------------------------------------------------------------------------------


def _invites() -> list[bytes]:
    relayed = f"/dns4/example.org/udp/4001/quic-v1/p2p/{peer_number(2)}/p2p-circuit/p2p/{peer_number(1)}"
    places = [
        ("/ip4/192.0.2.1/tcp/4001",),
        ("/ip4/192.0.2.1/tcp/4001", f"/ip6/2001:db8::7/tcp/9/p2p/{peer_number(1)}", relayed),
        tuple(f"/ip4/10.0.0.{at}/tcp/{at + 1}/p2p/{peer_number(at)}" for at in range(MAX_ADDRESSES)),
    ]
    texts = [Invite(RUN, peer_number(0), addresses).encode() for addresses in places]
    bodies = [invites._unbase32(text.partition(":")[2])[invites._HEAD : -invites._CHECKSUM] for text in texts]
    return [*(text.encode() for text in texts), b"<`" + texts[0].upper().encode() + b"`>.\n", *map(_packed, bodies)]


def _packed(body: bytes) -> bytes:
    return bytes(msgpack.packb([body]))


@target(_invites, max_bytes=8192, memory=1 << 20)
def invite(data: bytes) -> bool:
    """An invite as somebody pastes it: text; or msgpack [body], which gets the checksum that fits.

    Memory: 1 MiB, for at most 4096 characters.
    """
    try:
        found = Invite.decode(_text_of(data))
    except InviteError as error:
        check(str(error).isprintable() and len(str(error)) < 500, "an error that is no sentence")
        return False
    check(len(found.addresses) <= MAX_ADDRESSES, "too many addresses")
    check(all(len(each.encode()) <= MAX_ADDRESS_BYTES for each in found.addresses), "an address is too long")
    check(Invite.decode(found.encode()) == found, "another invite when it is encoded again")
    return True


def _text_of(data: bytes) -> str:
    try:
        (body,) = parts_of(data)
        head = bytes((1,)) + (invites._HEAD + len(body) + invites._CHECKSUM).to_bytes(2, "big")
        return invites._PREFIX + invites._base32(head + body + invites._checksum(head + body))
    except (ValueError, TypeError, OverflowError):  # anything that is no list of one body is a text as it is
        return data.decode(errors="replace")


# -- manifest ----------------------------------------------------------------------------------------------------------


def _manifests() -> list[bytes]:
    fields = make_manifest().model_dump()
    fields["model"]["config"] = {"hidden_size": 32, "rope": {"factors": [1.0, 2.5, None], "kind": "é"}, "tie": True}
    fields["data"] |= {"source": "text:/somewhere/*.txt", "digest": "ab" * 32}
    return [make_manifest().canonical_bytes(), RunManifest(**fields).canonical_bytes()]


@target(_manifests, max_bytes=MAX_MANIFEST_BYTES + 64, memory=64 * MAX_MANIFEST_BYTES, is_json=True)
def manifest(data: bytes) -> bool:
    """The manifest of a run, as a peer sends it. Memory: 64 x MAX_MANIFEST_BYTES, 4 MiB."""
    with suppress(ManifestError):
        check(RunManifest.from_bytes(data, RUN) is None, "a manifest of another run")
    try:
        found = RunManifest.from_bytes(data)
    except ManifestError:
        return False
    check(found.canonical_bytes() == data, "two spellings")
    check(RunManifest.from_bytes(data, found.run_id) == found, "another manifest by its run id")
    return True


# -- chunks ------------------------------------------------------------------------------------------------------------


def _downloads() -> list[bytes]:
    states = [make_state(), make_state(round_=3, seed=1)]
    downloads: list[Any] = []
    for state in states:
        chunks = [[index, bytes(part)] for index, part in enumerate(state.payload())]
        downloads += [[ChunkPlan.of(state).pack(), chunks], [ChunkPlan.of(state).pack(), chunks[:2]]]
    return [*map(msgpack.packb, downloads), ChunkPlan.of(states[1]).pack()]


@target(_downloads, max_bytes=16 * 1024, memory=1 << 20)
def chunks(data: bytes) -> bool:
    """The digests of a state's chunks, and then the chunks; nothing is kept that has another digest.

    An input is msgpack [plan, [[index, chunk], ...]], or else the bytes of a plan. Memory: 1 MiB, for a state of three
    chunks and 7.6 KB; beyond that it grows with the state, of which there is one copy here.
    """
    packed, pieces = _download_of(data)
    try:
        plan = ChunkPlan.unpack(packed, LAYOUT)
    except StateError as error:
        check(str(error).isprintable() and len(str(error)) < 500, "an error that is no sentence")
        return False
    check(plan.pack() == packed, "two spellings")
    store = SnapshotStore(None, RUN, LAYOUT)
    incoming = store.incoming(plan, RECORD)
    for index, piece in pieces:
        check(incoming.put(index, piece) == plan.fits(index, piece), "put and fits differ")
    if not incoming.missing():
        state = store.load(incoming.finish())
        check(bytes.fromhex(state.digest()) == plan.digest, "another state than the plan's")
    return True


def _download_of(data: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    try:
        plan, pieces = parts_of(data)
        right = isinstance(plan, bytes) and all(type(at) is int and type(piece) is bytes for at, piece in pieces)
        return (plan, pieces) if right else (data, [])
    except (ValueError, TypeError):  # anything that is no list of a plan and chunks is a plan as it is
        return data, []
