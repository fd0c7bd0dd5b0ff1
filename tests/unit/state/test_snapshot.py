"""Snapshots: round trips, what is listed, serving, and readers beside a running peer."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from states import LARGE, LAYOUT, RUN, chunks_in, fail_at, record_of, save, state_of

from p2pllm.errors import StateError
from p2pllm.state import FLOAT, ChunkPlan, Layout, SharedState, SnapshotStore, files


@pytest.mark.parametrize("layout", [LAYOUT, LARGE, Layout.of([])])
def test_a_state_comes_back_bit_for_bit(folder: Path | None, layout: Layout) -> None:
    store, saved = SnapshotStore(folder, RUN, layout), state_of(5, layout)
    snapshot = store.save(saved, record_of(5))
    assert (snapshot.round, snapshot.record, snapshot.state.hex()) == (5, record_of(5), saved.digest())
    assert store.all() == [snapshot]
    loaded = store.load(snapshot)
    assert loaded.digest() == saved.digest()
    loaded.moments["m"][:] += 1
    assert store.load(snapshot).digest() == saved.digest(), "what was loaded is a copy"


def test_others_can_read_the_format(tmp_path: Path) -> None:
    snapshot = save(SnapshotStore(tmp_path, RUN, LAYOUT), 5)[0]
    file, state = tmp_path / snapshot.name, state_of(5)
    assert file.name == f"state-{RUN[:16]}-round-00000005-{state.digest()[:16]}.safetensors"
    tensors = load_file(file)
    assert list(tensors) == list(LAYOUT.vectors)
    assert all(np.array_equal(*pair) for pair in zip(tensors.values(), state.vectors, strict=True))
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "p2pllm state 3" and metadata["run_id"] == RUN
    assert metadata["digest"] == state.digest() and metadata["record"] == record_of(5).hex()
    assert json.loads(metadata["header"]) == state.header() and Layout.from_json(metadata["layout"]) == LAYOUT


def test_a_process_without_the_model_finds_the_layout(tmp_path: Path) -> None:
    saved = save(SnapshotStore(tmp_path, RUN, LAYOUT), 5)
    store = SnapshotStore(tmp_path, RUN, None, read_only=True)
    assert store.all() == saved
    assert store.load(saved[0]).layout == LAYOUT


def test_the_newest_round_comes_first_and_other_runs_are_left_alone(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LAYOUT)
    saved = save(store, 2, 11, 3)
    if folder is not None:
        save(SnapshotStore(folder, "cd" * 32, LAYOUT), 9)
    assert store.all() == [saved[1], saved[2], saved[0]]
    store.drop(saved[2])
    store.drop(saved[2])
    assert store.all() == [saved[1], saved[0]]
    if folder is not None:
        assert len(SnapshotStore(folder, "cd" * 32, LAYOUT).all()) == 1


def test_two_branches_may_have_states_of_one_round(folder: Path | None) -> None:
    store, state, other = SnapshotStore(folder, RUN, LAYOUT), state_of(4), state_of(4)
    other.params[0] += 1
    saved = [store.save(state, record_of(4)), store.save(other, record_of(5))]
    assert sorted(store.all(), key=lambda snapshot: snapshot.record) == saved


def test_one_state_may_move_to_another_record(folder: Path | None) -> None:
    """Two rounds with the same aggregate but other members lead to the same state."""
    store = SnapshotStore(folder, RUN, LAYOUT)
    store.save(state_of(4), record_of(4))
    moved = store.save(state_of(4), record_of(5))
    assert store.all() == [moved] and moved.record == record_of(5)
    assert store.load(moved).digest() == state_of(4).digest()


def test_what_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(tmp_path, RUN, LAYOUT)
    saved = save(store, 4)
    fail_at(monkeypatch, "fsync", errno.ENOSPC)
    assert save(store, 4) == saved
    with pytest.raises(StateError):
        save(store, 5)


def test_nothing_is_found_where_nothing_is(folder: Path | None, tmp_path: Path) -> None:
    assert SnapshotStore(folder, RUN, LAYOUT).all() == []
    assert SnapshotStore(tmp_path / "none", RUN, LAYOUT, read_only=True).all() == []
    assert not (tmp_path / "none").exists()


def test_a_file_of_another_run_name_or_layout_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = save(SnapshotStore(tmp_path, RUN[:16] + "00" * 24, LAYOUT), 2)[0]
    assert SnapshotStore(tmp_path, RUN, LAYOUT).all() == []
    assert "another run" in caplog.text
    (tmp_path / other.name).unlink()
    saved = save(SnapshotStore(tmp_path, RUN, LAYOUT), 2)[0]
    assert SnapshotStore(tmp_path, RUN, Layout.of([("other", (LAYOUT.size,))])).all() == []
    assert "another layout" in caplog.text
    (tmp_path / saved.name).rename(tmp_path / saved.name.replace("00000002", "00000003"))
    assert SnapshotStore(tmp_path, RUN, LAYOUT).all() == []
    assert "its name" in caplog.text


def test_a_plan_is_that_of_the_state_and_chunks_are_its_bytes(folder: Path | None) -> None:
    store, state = SnapshotStore(folder, RUN, LARGE), state_of(7, LARGE)
    snapshot = store.save(state, record_of(7))
    assert store.plan(snapshot) == ChunkPlan.of(state)
    assert [store.chunk(snapshot, index) for index in range(9)] == chunks_in(state)
    assert store.chunk(snapshot, 9) is None and store.chunk(snapshot, -1) is None
    if folder is not None:
        reader = SnapshotStore(folder, RUN, None, read_only=True)
        assert reader.plan(snapshot) == ChunkPlan.of(state)
        assert reader.chunk(snapshot, 8) == chunks_in(state)[8]


def test_only_the_last_plans_are_kept(tmp_path: Path) -> None:
    """Others are read again: a plan is known without the file only while it is kept."""
    store = SnapshotStore(tmp_path, RUN, LAYOUT)
    saved = save(store, *range(1, 7))
    for snapshot in saved:
        store.drop(snapshot)
    assert store.plan(saved[-1]).digest == saved[-1].state
    with pytest.raises(StateError, match="not there any more"):
        store.plan(saved[0])


def test_a_snapshot_that_is_gone_is_not_there(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LAYOUT)
    snapshot = save(store, 3)[0]
    store.drop(snapshot)
    assert store.all() == [] and store.chunk(snapshot, 0) is None
    with pytest.raises(StateError, match="not there any more"):
        store.load(snapshot)


def test_a_file_that_vanishes_while_it_is_read_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = SnapshotStore(tmp_path, RUN, LAYOUT), SnapshotStore(tmp_path, RUN, LAYOUT, read_only=True)
    snapshot = save(owner, 3)[0]
    read = files._DiskReader.read_into

    def drop_and_read(self: files._DiskReader, at: int, target: memoryview) -> None:
        owner.drop(snapshot)
        read(self, at, target)

    monkeypatch.setattr(files._DiskReader, "read_into", drop_and_read)
    assert reader.load(snapshot).digest() == snapshot.state.hex()
    assert reader.all() == []


def test_another_process_reads_while_ours_saves_and_drops(tmp_path: Path) -> None:
    owner, reader = SnapshotStore(tmp_path, RUN, LAYOUT), SnapshotStore(tmp_path, RUN, LAYOUT, read_only=True)
    digests = {round_: state_of(round_).digest() for round_ in range(1, 41)}
    ended = threading.Event()

    def collect() -> None:
        for round_ in digests:
            save(owner, round_)
            for old in owner.all()[2:]:
                owner.drop(old)
        ended.set()

    thread = threading.Thread(target=collect)
    thread.start()
    loaded = 0
    while not ended.is_set() or not loaded:
        for snapshot in reader.all():
            assert reader.chunk(snapshot, 1) in (None, bytes(state_of(snapshot.round).payload()[1]))
            try:
                assert reader.load(snapshot).digest() == digests[snapshot.round]
                loaded += 1
            except StateError as error:
                assert "not there any more" in str(error)
    thread.join()
    assert [snapshot.round for snapshot in reader.all()] == [40, 39]


def test_read_only_changes_nothing(tmp_path: Path) -> None:
    snapshot = save(SnapshotStore(tmp_path, RUN, LAYOUT), 1)[0]
    draft = tmp_path / f".{snapshot.name}.0{files.DRAFT}"
    draft.write_bytes(b"half")
    store = SnapshotStore(tmp_path, RUN, LAYOUT, read_only=True)
    for change in (lambda: save(store, 2), lambda: store.drop(snapshot)):
        with pytest.raises(StateError, match="reading only"):
            change()
    assert draft.exists() and store.all() == [snapshot]


def test_a_state_of_round_zero_is_kept_like_any_other(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LAYOUT)
    state = SharedState.initial(LAYOUT, np.ones(LAYOUT.size, FLOAT))
    snapshot = store.save(state, record_of(0))
    assert snapshot.round == 0 and store.load(snapshot).digest() == state.digest()
