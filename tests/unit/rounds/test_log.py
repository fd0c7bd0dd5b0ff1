"""A log keeps what it was given: through reopening, torn ends, flipped bytes, full disks and kill -9."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import StateError
from p2pllm.identity import Identity
from p2pllm.rounds import log as log_module
from p2pllm.rounds.chain import Branch, start_of
from p2pllm.rounds.log import KEPT_ABANDONED, KEPT_CHECKPOINTS, MAGIC, RoundLog
from p2pllm.rounds.record import Body, Checkpoint, Claim, Head, Record, genesis

RUN, OTHER_RUN = "5a" * 32, "5b" * 32
FOUNDER = Identity(Ed25519PrivateKey.from_private_bytes(bytes(32)))
START = start_of(RUN)


def after(base: Branch, salt: int = 0, run: str = RUN) -> Record:
    """A record that follows `base`. It holds what looks like the start of a frame; its signatures are none."""
    claim = Claim(key=bytes(32), samples=1 + salt, loss=1.0, update=MAGIC * 8, signature=bytes(64))
    body = Body(
        run=bytes.fromhex(run),
        round=base.head[0] + 1,
        previous=base.head[1],
        total=base.total + claim.samples,
        members=(claim,),
        aggregate=MAGIC + b"\x01" + bytes(27),
        state=bytes([salt]) * 32,
    )
    return Record(body=body, votes=((bytes(32), bytes(64)),))


def grown(base: Branch, salts: list[int], run: str = RUN) -> list[Record]:
    """Records that follow `base`, one for each salt."""
    records = list[Record]()
    for salt in salts:
        records.append(after(base, salt, run))
        base = Branch(records[-1].head, records[-1].body.total, 0)
    return records


def opened(path: Path | None, read_only: bool = False) -> RoundLog:
    return RoundLog(path, RUN, FOUNDER.peer_id, read_only)


def filled(path: Path | None, salts: list[int]) -> RoundLog:
    log = opened(path)
    for record in grown(START, salts):
        log.append(record)
    return log


def checkpoint(head: Head) -> Checkpoint:
    return Checkpoint.sign(FOUNDER, RUN, head)


def seen(log: RoundLog) -> dict[str, Any]:
    """All that a log shows."""
    records = list(log.records())
    rounds = range(log.branch.head[0] + 2)
    assert records == [log.record(round_) for round_ in rounds[1:-1]]
    return {
        "branch": log.branch,
        "records": records,
        "digests": [log.digest(round_) for round_ in rounds],
        "missing": log.missing(),
        "abandoned": log.abandoned(),
        "checkpoint": log.checkpoint,
        "sample": log.sample(),
    }


@pytest.fixture(params=["memory", "file"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RoundLog]:
    """An empty log, in memory and in a file."""
    made = opened(None if request.param == "memory" else tmp_path / "deep" / "rounds.log")
    yield made
    made.close()


# -- what it does ------------------------------------------------------------------------------------------------------


def test_an_empty_log_stands_at_genesis(log: RoundLog) -> None:
    assert log.branch == START
    assert log.digest(0) == genesis(RUN)[1] and log.has(genesis(RUN))
    assert log.digest(1) is log.digest(-1) is log.record(0) is log.record(1) is log.record(-1) is log.checkpoint is None
    assert log.sample() == [genesis(RUN)]
    assert log.packed_after(genesis(RUN), 1000) == log.missing() == log.abandoned() == list(log.records()) == []


def test_records_are_kept_in_order(log: RoundLog) -> None:
    records = grown(START, [1, 2, 3])
    for record in records:
        log.append(record)
        assert log.branch == Branch(record.head, record.body.total, 0)
    assert list(log.records()) == records and list(log.records(first=3)) == records[2:]
    assert [log.record(round_) for round_ in (1, 2, 3, 4)] == [*records, None]
    assert log.digest(2) == records[1].body.digest and log.has(records[1].head)
    assert not log.has((2, bytes(32))) and not log.has((1, records[1].body.digest))


def test_what_does_not_follow_changes_nothing(log: RoundLog) -> None:
    records = grown(START, [1, 2, 3])
    log.append(records[0])
    before = seen(log)
    for wrong in (records[0], records[2], after(START, 9), after(log.branch, run=OTHER_RUN)):
        with pytest.raises(ValueError, match="record"):
            log.append(wrong)
    for base, following in [
        (records[1].head, []),
        ((1, bytes(32)), []),
        ((-1, bytes(32)), []),
        (records[0].head, [records[2]]),
        (genesis(RUN), [records[0], records[2]]),
    ]:
        with pytest.raises(ValueError, match=r"record|round"):
            log.switch(base, following)
    assert seen(log) == before


def test_another_branch_is_taken_and_the_old_one_abandoned(log: RoundLog) -> None:
    old = grown(START, [1, 2, 3, 4])
    for record in old:
        log.append(record)
    base = Branch(old[1].head, old[1].body.total, 0)
    new = grown(base, [7, 8, 9])
    assert log.switch(base.head, new) == old[2:]
    assert list(log.records()) == old[:2] + new
    assert log.branch == Branch(new[-1].head, new[-1].body.total, 0)
    assert log.abandoned() == [record.head for record in old[2:]]
    assert log.switch(base.head, old[2:]) == new  # and back again
    assert list(log.records()) == old
    assert log.abandoned() == [record.head for record in new]
    assert log.switch(genesis(RUN), old[:3]) == old[3:]  # what stays is not abandoned
    assert log.rewind(old[0].head) == old[1:3]
    assert log.rewind(genesis(RUN)) == old[:1]
    assert log.branch == START


def test_only_the_newest_abandoned_places_are_kept(log: RoundLog) -> None:
    many = grown(START, [0] * (KEPT_ABANDONED + 3))
    log.switch(genesis(RUN), many)
    log.rewind(many[0].head)
    assert log.abandoned() == [record.head for record in many[-KEPT_ABANDONED:]]


def test_checkpoints_count_where_the_founder_signed_them(log: RoundLog) -> None:
    records = grown(START, [1, 2, 3])
    for record in records:
        log.append(record)
    stranger = Identity.generate()
    assert not log.add_checkpoint(Checkpoint.sign(stranger, RUN, records[0].head))
    assert not log.add_checkpoint(Checkpoint.sign(FOUNDER, OTHER_RUN, records[0].head))
    assert log.checkpoint is None and log.branch.anchor == 0
    on, beside, beyond = (checkpoint(head) for head in (records[1].head, (3, bytes(32)), (9, bytes(32))))
    assert log.add_checkpoint(on) and not log.add_checkpoint(on)
    assert (log.checkpoint, log.branch.anchor) == (on, 2)
    assert log.add_checkpoint(beyond) and log.add_checkpoint(beside)
    assert (log.checkpoint, log.branch.anchor) == (beyond, 2)
    log.rewind(records[0].head)
    assert (log.checkpoint, log.branch.anchor) == (beyond, 0)
    log.append(records[1])
    assert log.branch.anchor == 2


def test_of_two_checkpoints_of_a_round_the_smaller_digest_is_told(log: RoundLog) -> None:
    for digest in (b"m" * 32, b"l" * 32, b"n" * 32):
        assert log.add_checkpoint(checkpoint((8, digest)))
    assert log.checkpoint == checkpoint((8, b"l" * 32))


def test_only_the_newest_checkpoints_are_kept(log: RoundLog) -> None:
    for round_ in range(2, KEPT_CHECKPOINTS + 3):
        assert log.add_checkpoint(checkpoint((round_, bytes(32))))
    assert not log.add_checkpoint(checkpoint((1, bytes(32))))
    assert not log.add_checkpoint(checkpoint((2, bytes(32))))  # was dropped, and is not taken for a new one
    assert log.checkpoint == checkpoint((KEPT_CHECKPOINTS + 2, bytes(32)))


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 8, 100])
def test_two_logs_find_where_they_part(log: RoundLog, rounds: int) -> None:
    records = grown(START, [0] * 100)
    log.switch(genesis(RUN), records)
    other = opened(None)
    base = Branch(records[rounds - 1].head, records[rounds - 1].body.total, 0) if rounds else START
    other.switch(genesis(RUN), [*records[:rounds], *grown(base, [5] * 40)])
    for one, two in [(log, other), (other, log)]:
        sample = one.sample()
        last = one.branch.head[0]
        assert sample[0] == one.branch.head and sample[-1] == genesis(RUN) and len(sample) <= 40
        assert all(one.has(head) for head in sample)
        found = two.common(sample)
        assert two.has(found) and found[0] <= rounds
        assert last - found[0] <= max(1, 2 * (last - rounds)) or found == genesis(RUN)
    assert log.common([]) == log.common([(5, bytes(32)), (-1, bytes(32)), (10**9, bytes(32))]) == genesis(RUN)


def test_records_are_handed_out_up_to_a_size(log: RoundLog) -> None:
    records = grown(START, [1, 2, 3, 4])
    log.switch(genesis(RUN), records)
    packed = [record.pack() for record in records]
    assert log.packed_after(genesis(RUN), 10**6) == packed
    assert log.packed_after(records[1].head, 10**6) == packed[2:]
    assert log.packed_after(genesis(RUN), sum(map(len, packed[:2]))) == packed[:2]
    assert log.packed_after(genesis(RUN), sum(map(len, packed[:2])) - 1) == packed[:1]
    assert log.packed_after(genesis(RUN), 1) == packed[:1]
    assert log.packed_after(records[3].head, 10**6) == log.packed_after((1, bytes(32)), 10**6) == []


# -- a log in a file, one in memory, and a model -----------------------------------------------------------------------


class Model:
    """What a log does, in lists that are copied."""

    def __init__(self) -> None:
        self.branch = list[Record]()
        self.left = list[Head]()
        self.points = set[Head]()

    def switch(self, back: int, records: list[Record]) -> None:
        self.left += [record.head for record in self.branch[len(self.branch) - back :]]
        self.branch = self.branch[: len(self.branch) - back] + records

    def at(self, back: int = 0) -> Branch:
        """The branch so many rounds ago."""
        branch = self.branch[: len(self.branch) - back]
        if not branch:
            return START
        heads = {record.head for record in branch}
        anchor = max((head[0] for head in self.points & heads), default=0)
        return Branch(branch[-1].head, branch[-1].body.total, anchor)

    def check(self, log: RoundLog) -> None:
        heads = [record.head for record in self.branch]
        left = [head for head in dict.fromkeys(self.left) if head not in heads]
        shown = seen(log)
        assert (shown["branch"], shown["records"], shown["missing"]) == (self.at(), self.branch, [])
        assert (shown["abandoned"], shown["digests"][1:-1]) == (left, [digest for _, digest in heads])
        newest = min(self.points, key=lambda head: (-head[0], head[1]), default=None)
        assert shown["checkpoint"] == (newest and checkpoint(newest))


class Act(NamedTuple):
    """One thing to do to a log."""

    what: str
    back: int
    salts: list[int]


acts = st.builds(
    Act,
    st.sampled_from(["append", "append", "switch", "rewind", "checkpoint", "beyond", "reopen", "tear"]),
    st.integers(0, 4),
    st.lists(st.integers(0, 3), max_size=4),
)


@given(st.lists(acts, max_size=14))
def test_a_log_does_what_the_model_does(script: list[Act]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "rounds.log", Model()
        logs = [opened(path), opened(None)]
        for act in script:
            back = min(act.back, len(model.branch))
            base = model.at(back)
            if act.what == "append":
                records = grown(model.at(), act.salts)
                for log, record in ((log, record) for log in logs for record in records):
                    log.append(record)
                model.switch(0, records)
            elif act.what in ("switch", "rewind"):
                records = grown(base, act.salts if act.what == "switch" else [])
                left = [record for record in model.branch[base.head[0] :] if record not in records]
                for log in logs:
                    assert log.switch(base.head, records) == left
                model.switch(back, records)
            elif act.what in ("checkpoint", "beyond") and base.head[0]:
                head = base.head if act.what == "checkpoint" else (base.head[0] + 7, bytes(32))
                for log in logs:
                    assert log.add_checkpoint(checkpoint(head)) == (head not in model.points)
                model.points.add(head)
            else:
                logs[0].close()
                if act.what == "tear":
                    with path.open("ab") as file:
                        file.write((MAGIC + b"\x01\0\0\1\0" + bytes(300))[: 1 + 75 * act.back])
                logs[0] = opened(path)
            for log in logs:
                model.check(log)
        model.check(opened(path, read_only=True))
        logs[0].close()


# -- torn and damaged files --------------------------------------------------------------------------------------------


def last_record(log: RoundLog) -> None:
    log.append(after(log.branch, 5))


def last_switch(log: RoundLog) -> None:
    log.switch(log.sample()[1], grown(Branch(log.sample()[1], log.branch.total - 4, 0), []))


def last_checkpoint(log: RoundLog) -> None:
    assert log.add_checkpoint(checkpoint(log.branch.head))


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


class Frame(NamedTuple):
    """A frame as the test reads it from an undamaged file."""

    start: int
    end: int
    kind: int
    payload: bytes


def frames_of(data: bytes, at: int = 0) -> list[Frame]:
    frames = list[Frame]()
    while at < len(data):
        assert data[at : at + 4] == MAGIC
        size = int.from_bytes(data[at + 5 : at + 9], "big")
        frames.append(Frame(at, at + 25 + size, data[at + 4], data[at + 9 : at + 9 + size]))
        at = frames[-1].end
    return frames


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
    with path.open("ab") as file:
        for kind, payload in [
            (k, p) for k in (1, 2, 3, 4, 9) for p in (far, elsewhere, texts, b"", b"\xc1", bytes(40))
        ]:
            file.write(log_module._frame(kind, payload))
    reader = opened(path, read_only=True)
    assert seen(reader) == whole
    reader.close()


# -- disks that do not work --------------------------------------------------------------------------------------------


def failing(code: int, real: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Fails with `code`; with a `real` write, half of the bytes go first."""

    def fail(handle: int, *rest: Any) -> int:
        if real is not None and len(rest[0]) > 40:
            return int(real(handle, rest[0][: len(rest[0]) // 2], *rest[1:]))
        raise OSError(code, os.strerror(code))

    return fail


CHANGES: list[Callable[[RoundLog], object]] = [
    last_record,
    last_checkpoint,
    lambda log: log.rewind(genesis(RUN)),
    lambda log: log.switch(genesis(RUN), grown(START, [6, 7, 8])),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("pwrite", errno.ENOSPC, "the disk or a quota is full; free 10 MB"),
        ("fsync", errno.EDQUOT, "the disk or a quota is full; free 10 MB"),
        ("fsync", errno.EIO, "Input/output error."),
        ("pwrite", errno.EROFS, "that is not permitted; allow it"),
    ],
)
def test_a_disk_that_does_not_take_it_is_one_sentence_and_nothing_changes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[RoundLog], object],
    call: str,
    code: int,
    words: str,
) -> None:
    path = tmp_path / "rounds.log"
    log = filled(path, [1, 2])
    before, data = seen(log), path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, call, failing(code, os.pwrite if call == "pwrite" else None))
        for _ in range(2):
            with pytest.raises(StateError, match=words) as caught:
                change(log)
            assert str(caught.value).startswith(f"The log of rounds {path} does not take more: ")
            assert seen(log) == before and path.read_bytes() == data
    change(log)
    done = seen(log)
    log.close()
    log = opened(path)
    assert seen(log) == done != before
    log.close()


def test_a_torn_end_that_cannot_be_cut_off_waits_for_the_next_write_or_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rounds.log"
    log = filled(path, [1, 2])
    before, size = seen(log), path.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "pwrite", failing(errno.EIO, os.pwrite))
        patch.setattr(log_module.os, "ftruncate", failing(errno.EIO))
        for _ in range(2):
            with pytest.raises(StateError, match="Input/output error"):
                log.switch(genesis(RUN), grown(START, [6, 7, 8, 9]))
        assert seen(log) == before and path.stat().st_size > size
    reader = opened(path, read_only=True)  # some of its frames are whole: what was refused may yet be there
    assert reader.branch.head[0] < 4
    reader.close()
    last_record(log)
    done = seen(log)
    log.close()
    log = opened(path)
    assert seen(log) == done
    log.close()


def test_a_log_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rounds.log"
    log = RoundLog(path, OTHER_RUN, FOUNDER.peer_id)
    log.append(grown(start_of(OTHER_RUN), [1], OTHER_RUN)[0])
    log.close()
    with pytest.raises(StateError, match=r"rounds\.log belongs to another run; move it away\."):
        opened(path)


def test_what_cannot_be_opened_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateError, match="cannot be opened: Is a directory"):
        opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be opened: "):
        opened(tmp_path / "file" / "rounds.log")
    monkeypatch.setattr(log_module.os, "open", failing(errno.EACCES))
    with pytest.raises(StateError, match="cannot be opened: that is not permitted; allow it or choose another"):
        opened(tmp_path / "rounds.log", read_only=True)


def test_a_closed_log_is_one_sentence(tmp_path: Path) -> None:
    log = filled(tmp_path / "rounds.log", [1])
    log.close()
    log.close()
    with pytest.raises(StateError, match="cannot be read: it was closed"):
        log.record(1)
    with pytest.raises(ValueError, match="closed"):
        last_record(log)


# -- others who read meanwhile -----------------------------------------------------------------------------------------


def test_a_reader_needs_no_file_and_makes_none(tmp_path: Path) -> None:
    reader = opened(tmp_path / "rounds.log", read_only=True)
    assert seen(reader)["branch"] == START
    with pytest.raises(ValueError, match="read only"):
        reader.append(after(START))
    assert list(tmp_path.iterdir()) == []
    reader.close()


def test_a_reader_does_not_take_another_record_for_the_one_it_knew(tmp_path: Path) -> None:
    """A writer that takes back what the disk refused may write something else in its place."""
    path = tmp_path / "rounds.log"
    filled(path, [1, 2]).close()
    reader = opened(path, read_only=True)
    path.write_bytes(b"")
    filled(path, [1, 3]).close()
    assert reader.record(1) is not None
    assert reader.record(2) is None and reader.missing() == [(2, reader.digest(2))]
    reader.close()


def test_threads_that_read_see_one_branch_or_the_other(log: RoundLog) -> None:
    first, second = grown(START, [1] * 6), grown(START, [2] * 9)
    log.switch(genesis(RUN), first)
    branches = {Branch(records[-1].head, records[-1].body.total, 0) for records in (first, second)}
    wrong, done = list[object](), threading.Event()

    def read() -> None:
        while not done.is_set():
            records, branch = list(log.records()), log.branch
            if branch not in branches or records not in (first, second):
                wrong.append((branch, records))
            log.packed_after(genesis(RUN), 10**6), log.sample(), log.abandoned(), log.missing()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for records in [second, first] * 40:
        log.switch(genesis(RUN), records)
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_log import START, after, opened
log = opened(Path(sys.argv[1]))
while True:
    log.append(after(log.branch, 1))
    print(log.branch.head[0], flush=True)
"""


def test_what_a_killed_writer_has_committed_is_there_and_a_reader_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "rounds.log"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path, Path(__file__).parent], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        try:
            committed = 0
            while committed < 200:
                committed = int(writer.stdout.readline())
                if committed % 20 == 0:
                    reader = opened(path, read_only=True)
                    records = list(reader.records())
                    assert len(records) >= committed and None not in records and reader.missing() == []
                    reader.close()
        finally:
            writer.send_signal(signal.SIGKILL)
        committed = max([committed, *map(int, writer.stdout.read().split())])
    log = opened(path)
    assert log.branch.head[0] >= committed
    assert list(log.records()) == grown(START, [1] * log.branch.head[0])
    log.close()
