"""Downloads: every chunk is checked, a draft that was torn goes on, and the file is what `save` would have written."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from states import LARGE, RUN, TINY, chunks_in, download, record_of, state_of

from p2pllm.errors import StateError
from p2pllm.state import ChunkPlan, Layout, SnapshotStore, files
from p2pllm.state.files import DiskFolder
from p2pllm.state.incoming import draft_of, is_draft

STATE = state_of(4, LARGE)
PLAN = ChunkPlan.of(STATE)
CHUNKS = chunks_in(STATE)
RECORD = record_of(4)
DRAFT = draft_of(PLAN.digest)


def test_chunks_in_any_order_make_the_snapshot(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LARGE)
    incoming = store.incoming(PLAN, RECORD)
    assert incoming.missing() == list(range(9))
    order = list(range(9)) * 2  # some peers answer twice
    random.Random(1).shuffle(order)
    for index in order:
        assert incoming.put(index, CHUNKS[index])
    assert incoming.missing() == []
    assert store.all() == []
    snapshot = incoming.finish()
    assert store.all() == [snapshot]
    assert (snapshot.round, snapshot.record, snapshot.state) == (4, RECORD, PLAN.digest)
    assert store.load(snapshot).digest() == STATE.digest()
    assert [store.chunk(snapshot, index) for index in range(9)] == CHUNKS


@pytest.mark.parametrize("layout", [TINY, LARGE, Layout.of([])])
def test_the_file_is_what_save_writes(tmp_path: Path, layout: Layout) -> None:
    state = state_of(4, layout)
    snapshot = download(SnapshotStore(tmp_path / "one", RUN, layout), state, RECORD).finish()
    assert snapshot == SnapshotStore(tmp_path / "other", RUN, layout).save(state, RECORD)
    assert (tmp_path / "one" / snapshot.name).read_bytes() == (tmp_path / "other" / snapshot.name).read_bytes()
    assert [file.name for file in (tmp_path / "one").iterdir()] == [snapshot.name]


def test_a_wrong_chunk_is_not_written(tmp_path: Path) -> None:
    incoming = download(SnapshotStore(tmp_path, RUN, LARGE), STATE, RECORD, only=range(2))
    before = (tmp_path / DRAFT).read_bytes()
    flipped = bytearray(CHUNKS[3])
    flipped[1000] ^= 4
    for index, data in [(2, CHUNKS[3]), (3, flipped), (3, CHUNKS[3][:-1]), (3, b""), (-1, CHUNKS[8]), (9, CHUNKS[8])]:
        assert not incoming.put(index, data)
    assert not incoming.put(0, CHUNKS[1]), "not even where a chunk is already"
    assert (tmp_path / DRAFT).read_bytes() == before
    assert incoming.missing() == list(range(2, 9))


def test_it_is_not_finished_before_all_is_there(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LARGE)
    incoming = download(store, STATE, RECORD, only=range(8))
    with pytest.raises(StateError, match="1 of 9 chunks"):
        incoming.finish()
    assert store.all() == []
    assert incoming.put(8, CHUNKS[8])
    assert store.all() == [] and [incoming.finish()] == store.all()


def test_a_download_that_was_broken_off_goes_on(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LARGE)
    download(store, STATE, RECORD, only=range(1, 6))
    again = store.incoming(PLAN, record_of(5))
    assert again.missing() == [0, 6, 7, 8]
    snapshot = download(store, STATE, record_of(5)).finish()
    assert snapshot.record == record_of(5), "the draft takes the record of the download that ends"
    assert store.load(snapshot).digest() == STATE.digest()


def test_a_draft_survives_the_process_and_only_its_damage_is_fetched_again(tmp_path: Path) -> None:
    download(SnapshotStore(tmp_path, RUN, LARGE), STATE, RECORD, only=range(7))
    draft = tmp_path / DRAFT
    raw = bytearray(draft.read_bytes())
    start = len(raw) - 3 * LARGE.nbytes
    raw[start + (1 << 20)] ^= 1  # the first byte of chunk 1
    raw[start + LARGE.nbytes - 1] ^= 128  # the last one of chunk 2
    raw[:start] = bytes(start)  # a crash may leave the head unwritten
    draft.write_bytes(raw)
    store = SnapshotStore(tmp_path, RUN, LARGE)
    assert store.incoming(PLAN, RECORD).missing() == [1, 2, 7, 8]
    snapshot = download(store, STATE, RECORD).finish()
    assert store.load(snapshot).digest() == STATE.digest()


def test_any_flipped_byte_of_a_draft_is_fetched_again(tmp_path: Path) -> None:
    state = state_of(2, TINY)
    store = SnapshotStore(tmp_path, RUN, TINY)
    download(store, state, RECORD)
    draft = tmp_path / draft_of(ChunkPlan.of(state).digest)
    whole = draft.read_bytes()
    start = len(whole) - 3 * TINY.nbytes
    for place in range(len(whole)):
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 8
        draft.write_bytes(raw)
        expected = [] if place < start else [(place - start) // TINY.nbytes]
        assert store.incoming(ChunkPlan.of(state), RECORD).missing() == expected
        download(store, state, RECORD)
        assert draft.read_bytes() == whole


@pytest.mark.parametrize("size", [0, 10, 5_000_000, 10_000_000])
def test_a_draft_of_another_size_is_begun_again(tmp_path: Path, size: int) -> None:
    (tmp_path / DRAFT).write_bytes(b"x" * size)
    store = SnapshotStore(tmp_path, RUN, LARGE)
    assert store.incoming(PLAN, RECORD).missing() == list(range(9))
    assert store.load(download(store, STATE, RECORD).finish()).digest() == STATE.digest()


def test_the_draft_of_another_state_is_removed(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN, LARGE)
    old = download(store, state_of(3, LARGE), record_of(3), only=range(4))
    download(store, STATE, RECORD, only=range(2))
    assert [file.name for file in tmp_path.iterdir()] == [DRAFT]
    with pytest.raises(StateError, match="round 3"):
        old.put(5, chunks_in(state_of(3, LARGE))[5])
    assert store.incoming(PLAN, RECORD).missing() == list(range(2, 9))


def test_what_is_given_up_leaves_nothing(folder: Path | None) -> None:
    store = SnapshotStore(folder, RUN, LARGE)
    incoming = download(store, STATE, RECORD, only=range(4))
    incoming.discard()
    with pytest.raises(StateError, match="cannot be kept"):
        incoming.put(5, CHUNKS[5])
    assert store.incoming(PLAN, RECORD).missing() == list(range(9))
    assert folder is None or [file.name for file in folder.iterdir()] == [DRAFT]


def test_a_state_of_another_layout_is_refused(folder: Path | None) -> None:
    with pytest.raises(StateError, match="another layout"):
        SnapshotStore(folder, RUN, TINY).incoming(PLAN, RECORD)


def test_read_only_takes_no_download(tmp_path: Path) -> None:
    download(SnapshotStore(tmp_path, RUN, LARGE), STATE, RECORD, only=range(4))
    before = (tmp_path / DRAFT).read_bytes()
    store = SnapshotStore(tmp_path, RUN, LARGE, read_only=True)
    assert store.all() == []
    with pytest.raises(StateError, match="reading only"):
        store.incoming(PLAN, RECORD)
    assert (tmp_path / DRAFT).read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room on a disk")
def test_a_disk_without_room_is_noticed_before_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, files.os, "posix_fallocate")
    with pytest.raises(StateError, match="full; free 7 MB") as caught:
        SnapshotStore(tmp_path, RUN, LARGE).incoming(PLAN, RECORD)
    assert str(tmp_path) in str(caught.value) and "round 4" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_loses_only_the_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(tmp_path, RUN, LARGE)
    kept = store.save(state_of(1, LARGE), record_of(1))
    incoming = download(store, STATE, RECORD, only=range(4))
    full(monkeypatch, DiskFolder, "write")
    with pytest.raises(StateError, match="full; free 7 MB"):
        incoming.put(4, CHUNKS[4])
    assert [file.name for file in tmp_path.iterdir()] == [kept.name]


@pytest.mark.parametrize("place", [(files.os, "fsync"), (Path, "replace")])
def test_a_disk_that_fails_at_the_end_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str]
) -> None:
    incoming = download(SnapshotStore(tmp_path, RUN, LARGE), STATE, RECORD)
    full(monkeypatch, *place)
    with pytest.raises(StateError, match="full; free 7 MB"):
        incoming.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    store = SnapshotStore(small_disk, RUN, None)
    small = download(store, state_of(1, TINY), record_of(1)).finish()
    with pytest.raises(StateError, match="full; free 7 MB"):
        store.incoming(PLAN, RECORD)
    assert [file.name for file in small_disk.iterdir()] == [small.name]
    assert store.load(small).digest() == state_of(1, TINY).digest()


def test_the_name_of_a_draft() -> None:
    assert is_draft(DRAFT) and f".incoming-{STATE.digest()[:16]}.part" == DRAFT
    assert not is_draft("state-abababababababab-round-00000004-0123456789abcdef.safetensors")


def full(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, name, fail)
