"""A log keeps what it was given, in memory and in a file, and shows the same as a model of it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_samples import FOUNDER, OTHER_RUN, RUN, START, after, checkpoint, grown, opened, seen

from p2pllm.identity import Identity
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.log import KEPT_ABANDONED, KEPT_CHECKPOINTS, MAGIC, RoundLog
from p2pllm.rounds.record import Checkpoint, Head, Record, genesis


@pytest.fixture(params=["memory", "file"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RoundLog]:
    """An empty log, in memory and in a file."""
    made = opened(None if request.param == "memory" else tmp_path / "deep" / "rounds.log")
    yield made
    made.close()


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
