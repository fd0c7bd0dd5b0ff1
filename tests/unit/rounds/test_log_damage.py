"""What damage takes from a log is missing, and no more: torn ends, flipped bytes, nonsense between frames."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_samples import (
    RUN,
    START,
    Frame,
    after,
    filled,
    frames_of,
    grown,
    last_checkpoint,
    last_record,
    last_switch,
    opened,
    seen,
)

from p2pllm.rounds.chain import Branch
from p2pllm.rounds.frames import frame as framed
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.record import Head, Record, genesis


@pytest.mark.parametrize("last", [last_record, last_switch, last_checkpoint])
def test_a_frame_that_is_torn_anywhere_was_never_written(tmp_path: Path, last: Callable[[RoundLog], None]) -> None:
    path, torn = tmp_path / "rounds.log", tmp_path / "torn.log"
    log = filled(path, [1, 2, 3])
    before, size = seen(log), path.stat().st_size
    last(log)
    done = seen(log)
    log.close()
    whole = path.read_bytes()
    assert done != before and len(whole) > size
    for end in range(size, len(whole)):
        torn.unlink(missing_ok=True)
        torn.write_bytes(whole[:end])
        reader = opened(torn, read_only=True)
        assert seen(reader) == before and torn.stat().st_size == end
        reader.close()
        log = opened(torn)
        assert seen(log) == before and torn.stat().st_size == size
        last(log)
        log.close()
        assert torn.read_bytes() == whole


def test_a_switch_that_is_torn_leaves_the_first_of_its_records(tmp_path: Path) -> None:
    path, torn = tmp_path / "rounds.log", tmp_path / "torn.log"
    log = filled(path, [1, 2, 3])
    old, size = list(log.records()), path.stat().st_size
    new = grown(Branch(old[0].head, old[0].body.total, 0), [7, 8])
    log.switch(old[0].head, new)
    log.close()
    states = list[Any]()
    for end in range(size, path.stat().st_size + 1):
        torn.unlink(missing_ok=True)
        torn.write_bytes(path.read_bytes()[:end])
        log = opened(torn)
        if list(log.records()) not in states:
            states.append(list(log.records()))
        log.close()
    assert states == [old, old[:1], [old[0], new[0]], [old[0], *new]]


def head_after(frames: list[Frame]) -> Head:
    """Every frame says where the branch was. A mended record does so where nothing above it is left."""
    head = genesis(RUN)
    for frame in frames:
        if frame.kind == 2:
            round_, digest, _ = msgpack.unpackb(frame.payload)
            head = (round_, digest)
        elif frame.kind == 1 or Record.unpack(frame.payload).head[0] > head[0]:
            head = Record.unpack(frame.payload).head
    return head


def branch_to(head: Head, known: dict[Head, Record]) -> list[Record]:
    records = list[Record]()
    while head != genesis(RUN):
        records.append(known[head])
        head = known[head].body.base
    return records[::-1]


histories = st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=4)), min_size=2, max_size=6)


@given(histories, st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_what_damage_takes_is_missing_and_can_be_mended(
    history: list[tuple[int, list[int]]], seed: int, damages: list[int]
) -> None:
    draw, known = random.Random(seed), dict[Head, Record]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.log"
        log = filled(path, [0, 1, 2])
        for back, salts in history:
            records = list(log.records())
            known |= {record.head: record for record in records if record}
            base = records[-back - 1] if back < len(records) else None
            place = Branch(base.head, base.body.total, 0) if base else START
            log.switch(place.head, grown(place, salts))
        known |= {record.head: record for record in log.records() if record}
        log.close()
        good = frames_of(path.read_bytes())
        for flips in damages:
            data = bytearray(path.read_bytes())
            for _ in range(min(flips, len(good))):
                frame = good.pop(draw.randrange(len(good)))
                data[draw.randrange(frame.start, frame.end)] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            check_mending(path, branch_to(head_after(good), known), known)
            good += frames_of(path.read_bytes(), good[-1].end if good else 0)


def check_mending(path: Path, truth: list[Record], known: dict[Head, Record]) -> None:
    """A damaged log ends where `truth` does, shows nothing that nobody wrote, and is whole once it is mended."""
    log, head = opened(path), truth[-1].head if truth else genesis(RUN)
    assert log.branch == Branch(head, truth[-1].body.total if truth else 0, 0)
    for round_, record in enumerate(log.records(), 1):
        assert record is None or (known[record.head] == record and record.body.digest == log.digest(round_))
    while missing := log.missing():
        assert all(log.record(round_) is None for round_, _ in missing)
        for place in missing:
            assert not log.mend(after(START, 77))
            assert log.mend(known[place]) and log.record(place[0]) == known[place]
            assert not log.mend(known[place])
    log.append(after(log.branch, 7))
    log.rewind(head)
    known |= {place: after(log.branch, 7) for place in [after(log.branch, 7).head]}
    mended = seen(log)
    assert (mended["records"], mended["branch"].head) == (truth, head)
    log.close()
    reopened = opened(path)
    assert {**seen(reopened), "abandoned": []} == {**mended, "abandoned": []}
    reopened.close()


def test_several_in_a_row_are_mended_from_the_last(tmp_path: Path) -> None:
    path = tmp_path / "rounds.log"
    records = list(filled(path, [0, 1, 2, 3, 4, 5]).records())
    data = bytearray(path.read_bytes())
    for frame in frames_of(bytes(data))[1:4]:
        data[frame.start + 7] ^= 255  # their lengths make no sense
    path.write_bytes(data)
    log = opened(path)
    assert list(log.records()) == [records[0], None, None, None, *records[4:]]
    assert log.branch.head == records[5].head
    assert [log.digest(round_) is None for round_ in range(7)] == [False, False, True, True, False, False, False]
    assert log.packed_after(genesis(RUN), 10**6) == [records[0].pack()]
    assert log.packed_after(records[3].head, 10**6) == [record.pack() for record in records[4:]]
    for record in (records[3], records[2], records[1]):
        assert log.missing() == [record.head]
        assert log.mend(record)
    assert log.missing() == [] and list(log.records()) == records
    log.close()
    assert list(opened(path).records()) == records


@pytest.mark.parametrize("round_", [2, 4])
def test_damage_while_the_log_is_open_is_noticed_and_mended(tmp_path: Path, round_: int) -> None:
    path = tmp_path / "rounds.log"
    log = filled(path, [0, 1, 2, 3])
    records, branch = list(log.records()), log.branch
    lost = records[round_ - 1]
    with path.open("r+b") as file:
        frame = frames_of(path.read_bytes())[round_ - 1]
        file.seek(frame.end - 20)
        file.write(bytes([frame.payload[-4] ^ 1]))
    assert log.record(round_) is None and log.missing() == [lost.head]
    assert len(log.packed_after(genesis(RUN), 10**6)) == round_ - 1
    assert log.branch == branch and log.has(lost.head)
    assert log.mend(lost)
    log.close()
    log = opened(path)
    assert list(log.records()) == records and log.branch == branch
    log.close()


def test_a_frame_is_found_behind_any_stretch_of_damage(tmp_path: Path) -> None:
    """The search goes from block to block of 64 KiB; a frame may begin where two meet."""
    path = tmp_path / "rounds.log"
    log = filled(path, [0, 1, 2])
    whole, frames = seen(log), frames_of(path.read_bytes())
    log.close()
    data = path.read_bytes()
    for size in (1, 8, 9, 30_000, *range((1 << 16) - 8, (1 << 16) + 8), 1 << 18):
        path.write_bytes(data[: frames[1].end] + bytes(size) + data[frames[1].end :])
        reader = opened(path, read_only=True)
        assert seen(reader) == whole, size
        reader.close()


def test_nonsense_in_an_undamaged_frame_is_skipped(tmp_path: Path) -> None:
    """Somebody else's file may hold anything; it must not make us count to a billion."""
    path = tmp_path / "rounds.log"
    log = filled(path, [0, 1])
    whole = seen(log)
    log.close()
    far = after(Branch((10**9 - 5, bytes(32)), 0, 0)).pack()
    elsewhere = after(Branch((0, bytes(32)), 0, 0)).pack()
    texts = msgpack.packb([[1, bytes.fromhex(RUN), "2", "", "", [], 1, 1], []])
    maps = msgpack.packb([[1, bytes.fromhex(RUN), 3, bytes(32), 9, [{}], 1, 1], []])
    lists = msgpack.packb([[1, bytes.fromhex(RUN), 3, [[]], 9, [[b"", 1]], 1, 1], []])
    with path.open("ab") as file:
        for kind, payload in [
            (k, p) for k in (1, 2, 3, 4, 9) for p in (far, elsewhere, texts, maps, lists, b"", b"\xc1", bytes(40))
        ]:
            file.write(framed(kind, payload))
    reader = opened(path, read_only=True)
    assert seen(reader) == whole
    reader.close()
