"""Snapshots: round trips, damage, full and forbidden disks, and readers beside a running peer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from states import LARGE, LAYOUT, RUN, TINY, chunks_in, record_of, state_of

from p2pllm.errors import StateError
from p2pllm.state import CHUNK_BYTES, FLOAT, ChunkPlan, Layout, SharedState, Snapshot, SnapshotStore, files

LARGE_STATE = state_of(2, LARGE)


def save(store: SnapshotStore, *rounds: int, layout: Layout = LAYOUT) -> list[Snapshot]:
    return [store.save(state_of(round_, layout), record_of(round_)) for round_ in rounds]


@pytest.mark.parametrize("layout", [LAYOUT, LARGE, Layout.of([])])
def test_a_state_comes_back_bit_for_bit(folder: Path | None, layout: Layout) -> None:
    store, saved = SnapshotStore(folder, RUN, layout), state_of(5, layout)
    snapshot = store.save(saved, record_of(5))
    assert (snapshot.round, snapshot.record, snapshot.state.hex()) == (5, record_of(5), saved.digest())
    assert store.all() == [snapshot]
    out = np.zeros(layout.size, FLOAT)
    loaded = store.load(snapshot, out)
    assert loaded.params is out
    assert loaded.digest() == saved.digest()
    loaded.m += 1
    assert store.load(snapshot).digest() == saved.digest(), "what was loaded is a copy"


def test_others_can_read_the_format(tmp_path: Path) -> None:
    snapshot = save(SnapshotStore(tmp_path, RUN, LAYOUT), 5)[0]
    file, state = tmp_path / snapshot.name, state_of(5)
    assert file.name == f"state-{RUN[:16]}-round-00000005-{state.digest()[:16]}.safetensors"
    tensors = load_file(file)
    assert all(np.array_equal(tensors[name], getattr(state, name)) for name in ("params", "m", "v"))
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "p2pllm state 2" and metadata["run_id"] == RUN
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


def test_any_flipped_byte_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Head, record and padding too: `all` does not list the file, or `load` refuses it."""
    store = SnapshotStore(tmp_path, RUN, TINY)
    state, record = state_of(2, TINY), record_of(2)
    snapshot = store.save(state, record)
    file = tmp_path / snapshot.name
    whole = file.read_bytes()
    start = len(whole) - 3 * TINY.nbytes
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert store.all() == ([snapshot] if place >= start else []), place
        out = np.full(TINY.size, 7, FLOAT)
        with pytest.raises(StateError, match="damaged"):
            store.load(snapshot, out)
        assert (out == 7).all()
        assert not file.exists(), "what is damaged is removed, so that the next save writes it"
    assert "Skipped" in caplog.text and "not used" in caplog.text
    assert store.save(state, record) == snapshot
    assert file.read_bytes() == whole


@given(place=st.floats(0, 0.999999), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_never_served(tmp_path: Path, place: float, bit: int) -> None:
    chunks = chunks_in(LARGE_STATE)
    snapshot = SnapshotStore(tmp_path, RUN, LARGE).save(LARGE_STATE, record_of(2))
    file = tmp_path / snapshot.name
    planned, fresh = (SnapshotStore(tmp_path, RUN, LARGE, read_only=True) for _ in range(2))
    planned.plan(snapshot)
    raw = bytearray(file.read_bytes())
    at = int(place * len(raw))
    raw[at] ^= 1 << bit
    file.write_bytes(raw)
    served = [planned.chunk(snapshot, index) for index in range(9)]
    assert all(data in (None, chunks[index]) for index, data in enumerate(served))
    if (at := at - (len(raw) - 3 * LARGE.nbytes)) >= 0:
        damaged = 3 * (at // LARGE.nbytes) + at % LARGE.nbytes // CHUNK_BYTES
        assert [data is None for data in served] == [index == damaged for index in range(9)]
    assert [fresh.chunk(snapshot, index) for index in range(9)] == [None] * 9, "without a plan all of it is in doubt"
    file.unlink()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_torn_file_is_skipped_with_one_warning(tmp_path: Path, part: float, caplog: pytest.LogCaptureFixture) -> None:
    store = SnapshotStore(tmp_path, RUN, LAYOUT)
    first, second = save(store, 1, 2)
    file = tmp_path / second.name
    os.truncate(file, int(part * file.stat().st_size))
    assert store.all() == [first] and store.all() == [first]
    assert caplog.text.count(file.name) == 1
    assert store.chunk(second, 2) is None, "it was at the end"
    assert save(store, 2) == [second]
    assert store.load(second).digest() == state_of(2).digest()


def test_nonsense_under_our_name_is_skipped(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN, LAYOUT)
    snapshot = save(store, 2)[0]
    file = tmp_path / snapshot.name
    for raw in (b"nonsense", b"\xff" * 100, (8).to_bytes(8, "little") + b"[" * 8, b"\x02" + bytes(7) + b"{}" * 9):
        file.write_bytes(raw)
        assert store.all() == []


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


def test_the_plan_of_a_damaged_file_is_refused(tmp_path: Path) -> None:
    snapshot = save(SnapshotStore(tmp_path, RUN, LARGE), 7, layout=LARGE)[0]
    file = tmp_path / snapshot.name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    reader = SnapshotStore(tmp_path, RUN, LARGE, read_only=True)
    with pytest.raises(StateError, match="damaged"):
        reader.plan(snapshot)
    assert file.exists(), "who may only read removes nothing"
    with pytest.raises(StateError, match="damaged"):
        SnapshotStore(tmp_path, RUN, LARGE).plan(snapshot)
    assert not file.exists()


def test_only_the_last_plans_are_kept(tmp_path: Path) -> None:
    """Others are read again: a plan is known without the file only while it is kept."""
    store = SnapshotStore(tmp_path, RUN, LAYOUT)
    saved = save(store, *range(1, 7))
    for snapshot in saved:
        store.drop(snapshot)
    assert store.plan(saved[-1]).digest == saved[-1].state
    with pytest.raises(StateError, match="not there any more"):
        store.plan(saved[0])


def test_a_state_that_is_not_finite_is_not_adopted(folder: Path | None) -> None:
    store, state = SnapshotStore(folder, RUN, LAYOUT), state_of(3)
    state.m[7] = np.nan
    with pytest.raises(StateError, match="not finite"):
        store.load(store.save(state, record_of(3)))


def test_a_vector_that_does_not_fit_is_refused(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LAYOUT)
    snapshot = save(store, 3)[0]
    with pytest.raises(StateError, match="params"):
        store.load(snapshot, np.zeros(LAYOUT.size - 1, FLOAT))
    assert store.all() == [snapshot]


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


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops the write half-way, as a full disk does."""
    saved = save(SnapshotStore(tmp_path, RUN, LAYOUT), 1)
    before = sorted(tmp_path.iterdir())
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from p2pllm.errors import StateError\n"
        "from p2pllm.state import Layout, SharedState, SnapshotStore\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "state = SharedState.initial(Layout.of([('a', (5000,))]), np.zeros(5000, np.float32))\n"
        "try:\n    SnapshotStore(Path(sys.argv[1]), sys.argv[2], None).save(state, bytes(32))\n"
        "except StateError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, RUN], capture_output=True, text=True, timeout=60)
    assert "full" in done.stdout and str(tmp_path) in done.stdout, done.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert SnapshotStore(tmp_path, RUN, LAYOUT).all() == saved


def test_a_disk_that_is_full_takes_it_when_there_is_room_again(small_disk: Path) -> None:
    store = SnapshotStore(small_disk, RUN, None)
    layout = Layout.of([("a", (100_000,))])  # 1.2 MB
    first = store.save(state_of(1, layout), record_of(1))
    with pytest.raises(StateError, match="full; free 2 MB"):
        store.save(state_of(2, layout), record_of(2))
    assert [file.name for file in small_disk.iterdir()] == [first.name]
    assert store.load(first).digest() == state_of(1, layout).digest()
    store.drop(first)
    second = store.save(state_of(2, layout), record_of(2))
    assert store.load(second).digest() == state_of(2, layout).digest()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "full; free 1 MB"), (errno.EACCES, "not permitted"), (errno.EIO, "Input/output error")],
)
def test_a_failed_write_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    store = SnapshotStore(tmp_path, RUN, LAYOUT)
    save(store, 1)
    before = sorted(tmp_path.iterdir())
    fail_at(monkeypatch, call, code)
    with pytest.raises(StateError, match=words) as caught:
        save(store, 2)
    assert str(tmp_path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EACCES, "no permission to read it; allow it"), (errno.EIO, "Input/output error")]
)
def test_a_failed_read_is_one_sentence_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    store = SnapshotStore(tmp_path, RUN, LAYOUT)
    snapshot = save(store, 1)[0]
    fail_at(monkeypatch, "preadv", code)
    with pytest.raises(StateError, match=words):
        store.load(snapshot)
    assert store.chunk(snapshot, 0) is None
    if code == errno.EACCES:  # starting without the state because of it would be worse
        with pytest.raises(StateError, match=words):
            store.all()
    else:
        assert store.all() == []
    monkeypatch.undo()
    assert store.all() == [snapshot]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    snapshot = save(SnapshotStore(tmp_path, RUN, LAYOUT), 1)[0]
    leftover = tmp_path / f".{snapshot.name}.0{files.DRAFT}"
    foreign = tmp_path / f".state-{'cd' * 8}-round-00000001-{'0' * 16}.safetensors.0{files.DRAFT}"
    leftover.write_bytes(b"half")
    foreign.write_bytes(b"half")
    assert SnapshotStore(tmp_path, RUN, LAYOUT).all() == [snapshot]
    assert not leftover.exists() and foreign.exists()


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("")
    with pytest.raises(StateError, match="cannot be opened"):
        SnapshotStore(tmp_path / "states", RUN, LAYOUT)
    with pytest.raises(StateError, match="cannot be read"):
        SnapshotStore(tmp_path / "states", RUN, LAYOUT, read_only=True).all()


def test_a_state_of_round_zero_is_kept_like_any_other(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LAYOUT)
    state = SharedState.initial(LAYOUT, np.ones(LAYOUT.size, FLOAT))
    snapshot = store.save(state, record_of(0))
    assert snapshot.round == 0 and store.load(snapshot).digest() == state.digest()


def fail_at(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    """Have the system call fail as on a bad disk."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*(Path, call) if call == "replace" else (files.os, call), fail)
