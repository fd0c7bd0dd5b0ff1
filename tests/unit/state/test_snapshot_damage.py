"""Snapshots that are damaged, and disks that are full, forbidden or failing."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import LARGE, LAYOUT, RUN, TINY, chunks_in, fail_at, record_of, save, state_of

from p2pllm.errors import StateError
from p2pllm.state import CHUNK_BYTES, Layout, Snapshot, SnapshotStore, files

LARGE_STATE = state_of(2, LARGE)


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
        with pytest.raises(StateError, match="damaged"):
            store.load(snapshot)
        assert not file.exists(), "what is damaged is removed, so that the next save writes it"
    assert "Skipped" in caplog.text and "not used" in caplog.text
    assert store.save(state, record) == snapshot
    assert file.read_bytes() == whole


@functools.cache
def large_snapshot() -> tuple[Snapshot, bytes]:
    """A snapshot of `LARGE_STATE` and its file: saving one takes longer than looking at it."""
    with tempfile.TemporaryDirectory() as folder:
        snapshot = SnapshotStore(Path(folder), RUN, LARGE).save(LARGE_STATE, record_of(2))
        return snapshot, (Path(folder) / snapshot.name).read_bytes()


@given(place=st.floats(0, 0.999999), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_never_served(tmp_path: Path, place: float, bit: int) -> None:
    chunks = chunks_in(LARGE_STATE)
    snapshot, whole = large_snapshot()
    file = tmp_path / snapshot.name
    file.write_bytes(whole)
    planned, fresh = (SnapshotStore(tmp_path, RUN, LARGE, read_only=True) for _ in range(2))
    planned.plan(snapshot)
    raw = bytearray(whole)
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


def test_a_state_that_is_not_finite_is_not_adopted(folder: Path | None) -> None:
    store, state = SnapshotStore(folder, RUN, LAYOUT), state_of(3)
    state.moments["m"][7] = np.nan
    with pytest.raises(StateError, match="not finite"):
        store.load(store.save(state, record_of(3)))


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
