"""Target: what the other member of an all-reduce sends, and the codecs."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio import StreamReader, StreamWriter
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np

from fuzzing.hosts import watch
from fuzzing.promise import check, parts_of, target
from p2pllm.averaging import DenseAllReduce, ExchangeResult, Group, codec
from p2pllm.averaging.attempt import ACCEPTED, MAGIC, STREAM_METHOD
from p2pllm.averaging.dense import NOTICE_METHOD
from p2pllm.errors import NetworkError
from p2pllm.testing import MemoryHost, MemoryNetwork, peer_number, run

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "averaging"))
from cluster import SocketNetwork

SIZE, PART = 200, 64  # elements: two parts for each of the two members
MEMBERS = (peer_number(0), peer_number(1))
FP16, SOCKETS, CLOSES = 1, 2, 4
"""Bits of the first number of an input: the codec, streams on sockets as real ones are, and who closes its stream."""


class Sent(NamedTuple):
    """An input: what the other member writes to the stream that it opens, to ours, and in a notice that it gave up."""

    flags: int
    opened: bytes
    answered: bytes
    notice: bytes


def _group(flags: int) -> Group:
    return Group(bytes(range(32)), MEMBERS, (3.0, 5.0), SIZE, "fp16" if flags & FP16 else "fp32")


def _updates() -> list[bytes]:
    sent = list[Sent]()
    for flags in (0, FP16, SOCKETS, SOCKETS | FP16):
        group = _group(flags)
        values = np.random.default_rng(flags).standard_normal(SIZE).astype(np.float32)
        spans = [b"".join(codec(group.codec).encode(values[part]) for part in group.parts(at, PART)) for at in (0, 1)]
        header = MAGIC + group.group_id + group.digest(PART)
        sent.append(Sent(flags, header + spans[0], ACCEPTED + spans[1], b""))
    header = sent[0].opened[len(MAGIC) : len(MAGIC) + 64]
    sent += [sent[0]._replace(notice=header + bytes(32)), sent[2]._replace(notice=header + b"\x03" + bytes(31))]
    return [bytes(msgpack.packb(each)) for each in sent]


@target(_updates, max_bytes=4096, memory=2 << 20)
def update(data: bytes) -> bool:
    """One all-reduce of two members, of which the other one sends what it likes; and the codecs.

    An input is msgpack [flags, opened, answered, notice], see Sent; any is the data of a codec, too. Memory: 2 MiB; a
    vector has 800 bytes, and what a socket gives at once up to 256 KiB.
    """
    _decode(data)
    try:
        sent = Sent(*parts_of(data))
        right = [type(each) for each in sent] == [int, bytes, bytes, bytes]
    except (ValueError, TypeError):  # it has been decoded, and there is no more to do with it
        return False
    return right and run(_exchanged(sent))


def _decode(data: bytes) -> None:
    for name in ("fp32", "fp16", "bf16", "int8"):
        used = codec(name)
        out = np.empty(len(data) // used.bytes_for(1), np.float32)
        try:
            used.decode(data, out)
        except ValueError:
            check(len(data) != used.bytes_for(out.size), "a codec refuses what fits")


async def _exchanged(sent: Sent) -> bool:
    """Whether we hold an aggregate in the end, which is finite then, or a notice counted."""
    network = SocketNetwork() if sent.flags & SOCKETS else MemoryNetwork()
    ours, other = network.host(0), network.host(1)
    engine = DenseAllReduce(ours, part_bytes=4 * PART)
    await engine.start()
    failures = watch(ours, STREAM_METHOD)

    async def answer(caller: str, reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(sent.answered)
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass

    await other.serve_stream(STREAM_METHOD, answer)
    vector = np.ones(SIZE, np.float32)
    held = list[StreamWriter]()  # a writer that is forgotten closes its stream
    result, _ = await asyncio.gather(engine.run(_group(sent.flags), vector, 30.0), _speak(other, sent, held))
    for pipe in list(other.pipes):
        pipe.abort()
    await asyncio.sleep(60)  # until all that waits for a time-out has had it
    if failures:
        raise failures[0]
    _look_at(result)
    return result.aggregate is not None or bool(result.accused)


async def _speak(other: MemoryHost, sent: Sent, held: list[StreamWriter]) -> None:
    """What the other member does of itself."""
    with contextlib.suppress(NetworkError, ConnectionError):
        _, writer = await other.open_stream(MEMBERS[0], STREAM_METHOD)
        held.append(writer)
        writer.write(sent.opened)
        if sent.notice:
            await other.call(MEMBERS[0], NOTICE_METHOD, sent.notice, 1.0)
        if sent.flags & CLOSES:
            writer.close()


def _look_at(result: ExchangeResult) -> None:
    check((result.aggregate is None) == bool(result.reason), "a failure without a reason, or a reason without one")
    check(result.failed <= set(MEMBERS) and set(result.accused) <= {MEMBERS[1]}, "strangers are blamed, or blame")
    if result.aggregate is not None:
        check(result.aggregate.shape == (SIZE,) and bool(np.isfinite(result.aggregate).all()), "no finite aggregate")
