"""Targets: both sides of a fetch, and a log, a snapshot and aggregates that a stranger gives."""

from __future__ import annotations

import functools
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np

from fuzzing.hosts import watch
from fuzzing.network_targets import UNFILLED
from fuzzing.promise import check, parts_of, target
from p2pllm.errors import NetworkError
from p2pllm.network.bulk import BulkServer, fetch
from p2pllm.network.messages import pack
from p2pllm.rounds.catchup import CatchUp
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.fetching import Fetcher
from p2pllm.rounds.record import Body, Checkpoint, Claim, Record, pack_all, sign_vote
from p2pllm.rounds.serving import Serving
from p2pllm.state import AdamW, ChunkPlan, SharedState
from p2pllm.state.chunks import digest_of
from p2pllm.testing import LAYOUT, MemoryNetwork, identity_number, make_manifest, make_state, run

ROUNDS = 3
MANIFEST = make_manifest(snapshot_every=2)
OPTIMIZER = AdamW(MANIFEST.optimizer, MANIFEST.round.rounds, LAYOUT)
LIAR = identity_number(1)


@functools.cache
def history() -> tuple[list[Record], list[np.ndarray], list[SharedState]]:
    """Records of the liar alone, their aggregates, and the states from round 0 on."""
    states, records, vectors = [make_state()], list[Record](), list[np.ndarray]()
    disk = Disk(None, MANIFEST, LAYOUT)
    for seed in range(ROUNDS):
        vector = np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32)
        state = make_state()
        OPTIMIZER.step(states[-1], vector, state)
        branch = disk.log.branch
        body = Body(
            run=bytes.fromhex(MANIFEST.run_id),
            round=state.round,
            previous=branch.head[1],
            total=branch.total + 4,
            members=(Claim.sign(LIAR, branch.head, 4, 1.0, bytes(32)),),
            aggregate=digest_of(vector.data.cast("B")),
            state=bytes.fromhex(state.digest()),
        )
        records.append(Record.of(body, {LIAR.peer_id: sign_vote(LIAR, body.digest)}))
        disk.log.append(records[-1])
        states.append(state)
        vectors.append(vector)
    return records, vectors, states


def framed(header: dict[str, Any], body: bytes = b"") -> bytes:
    """The bytes of an answer to a fetch."""
    packed = pack({"found": True, **header})
    return len(packed).to_bytes(4, "big") + packed + len(body).to_bytes(8, "big") + body


# -- bulk --------------------------------------------------------------------------------------------------------------


def _fetches() -> list[bytes]:
    records, vectors, states = history()
    requests: list[dict[str, Any]] = [
        {"what": "log", "heads": [list(record.head) for record in records]},
        {"what": "record", "round": 1, "digest": records[0].head[1]},
        {"what": "snapshots"},
        {"what": "plan", "state": bytes.fromhex(states[2].digest())},
        {"what": "chunk", "state": bytes.fromhex(states[2].digest()), "index": 1},
        {"what": "aggregate", "digest": digest_of(vectors[0].data.cast("B"))},
    ]
    answers = [framed({"base": list(records[0].head)}, records[1].pack()), framed({}), pack({"found": False})]
    return [
        *(bytes(msgpack.packb([_length(pack(request)), answers[0]])) for request in requests),
        *(bytes(msgpack.packb([_length(pack(requests[0])), answer])) for answer in answers),
    ]


def _length(packed: bytes) -> bytes:
    return len(packed).to_bytes(4, "big") + packed


@target(_fetches, max_bytes=16 * 1024, memory=UNFILLED)
def bulk(data: bytes) -> bool:
    """A stranger's request to one who serves, and a stranger's answer to one who asks: msgpack [request, answer].

    Memory: 96 MiB.
    """
    try:
        request, answer = parts_of(data)
    except (ValueError, TypeError):  # anything that is no pair is both
        request = answer = data
    if not isinstance(request, bytes) or not isinstance(answer, bytes):
        return False
    return run(_served(request, answer))


@functools.cache
def _server_disk() -> Disk:
    records, vectors, states = history()
    disk = Disk(None, MANIFEST, LAYOUT)
    for record, vector in zip(records, vectors, strict=True):
        disk.log.append(record)
        disk.aggregates.put(record.body.aggregate, vector.tobytes())
    disk.snapshots.save(states[2], records[1].head[1])
    return disk


async def _served(request: bytes, answer: bytes) -> bool:
    network = MemoryNetwork()
    server, client, liar = (network.host(number) for number in range(3))
    await BulkServer(server, Serving(_server_disk()).answer).start()
    failures = watch(server, "fetch")
    reader, writer = await client.open_stream(server.peer_id, "fetch")
    writer.write(request)
    served = await reader.read(-1)
    writer.close()
    if failures:
        raise failures[0]
    await liar.serve_stream("fetch", lambda peer, reader, writer: _say(writer, answer))
    got = None
    with suppress(NetworkError):
        got = await fetch(client, liar.peer_id, {"what": "log"}, 8192)
    check(got is None or (isinstance(got[0], dict) and len(got[1]) <= 8192), "more than was asked for")
    return bool(served) or got is not None


async def _say(writer: StreamWriter, answer: bytes) -> None:
    writer.write(answer)


# -- catchup -----------------------------------------------------------------------------------------------------------


def _given() -> list[bytes]:
    records, vectors, states = history()
    point = Checkpoint.sign(identity_number(0), MANIFEST.run_id, records[1].head).pack()
    plan = ChunkPlan.of(states[2])
    page = framed(
        {"base": [0, records[0].body.previous], "checkpoints": [point]}, pack_all([r.pack() for r in records])
    )
    given: dict[str, list[bytes]] = {
        "log": [page],
        "snapshots": [framed({"snapshots": [[2, records[1].head[1], plan.digest]]})],
        "plan": [framed({}, plan.pack())],
        "chunk": [framed({}, bytes(part)) for part in states[2].payload()],
        "aggregate": [framed({}, vector.tobytes()) for vector in vectors[2:]],
    }
    halves = {**given, "log": [framed({"base": [0, records[0].body.previous]}, pack_all([r.pack()])) for r in records]}
    return [bytes(msgpack.packb(each)) for each in (given, halves)]


@target(_given, max_bytes=32 * 1024, memory=UNFILLED)
def catchup(data: bytes) -> bool:
    """Somebody with nothing catches up with what a stranger gives: msgpack {what is asked for: [answer, ...]}.

    Afterwards its state is the one that its log names, or its log is as it was. Memory: 96 MiB.
    """
    try:
        given = parts_of(data)
        right = all(isinstance(answers, list) for answers in given.values())
        right = right and all(isinstance(answer, bytes) for answers in given.values() for answer in answers)
    except (ValueError, AttributeError):  # anything that is no map of answers is the answer to everything
        return run(_caught_up({"log": [data], "snapshots": [data], "plan": [data], "chunk": [data]}))
    return right and run(_caught_up(given))


async def _caught_up(given: dict[str, list[bytes]]) -> bool:
    network = MemoryNetwork()
    ours, liar = network.host(0), network.host(1)
    answers = {what: each[:100] for what, each in given.items()}

    async def answer(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        request = msgpack.unpackb(await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big")))
        waiting = answers.get(request["what"], [])
        at = request.get("index", 0)  # chunks are asked for in any order, all else in that in which it is given
        if at < len(waiting):
            writer.write(waiting[at] if request["what"] == "chunk" else waiting.pop(0))

    await liar.serve_stream("fetch", answer)
    disk, into = Disk(None, MANIFEST, LAYOUT), make_state()
    fetcher = Fetcher(ours, disk, LAYOUT)
    before = disk.log.branch
    branch = Branch((ROUNDS, bytes(32)), 99, 0)
    done = await CatchUp(fetcher, disk, OPTIMIZER).run(branch, [liar.peer_id], None, into)
    if not done:
        check(disk.log.branch.head == before.head, "the log has moved to what it could not follow")
        return False
    head = disk.log.record(disk.log.branch.head[0])
    check(head is None or head.body.state == bytes.fromhex(into.digest()), "another state than the log's")
    return True
