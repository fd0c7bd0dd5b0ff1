"""Blobs: kept whole or not at all, and never trusted without their digest."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import fail_at

from p2pllm.errors import StateError
from p2pllm.state import BlobStore, files

DATA = bytes(range(256)) + b"aggregate"
LARGE = os.urandom(3 << 20)  # above what one thread hashes


def name_of(data: bytes) -> bytes:
    return blake3(data).digest()


@given(contents=st.lists(st.binary(max_size=300), unique=True, max_size=6))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_put_comes_back_until_it_is_dropped(folder: Path | None, contents: list[bytes]) -> None:
    store = BlobStore(folder)
    for data in contents:
        store.put(name_of(data), data)
    assert store.digests() == {name_of(data) for data in contents}
    assert sum(store.sizes()) == sum(map(len, contents))
    for data in contents:
        assert store.has(name_of(data)) and store.size(name_of(data)) == len(data)
        assert store.get(name_of(data)) == data
        store.drop(name_of(data))
        assert not store.has(name_of(data)) and store.size(name_of(data)) == 0
        assert store.get(name_of(data)) is None
        store.drop(name_of(data))
    assert sum(store.sizes()) == 0 and not store.digests()


def test_a_buffer_may_be_used_again_after_it_was_put(folder: Path | None) -> None:
    store, buffer = BlobStore(folder), bytearray(LARGE)
    store.put(name_of(LARGE), memoryview(buffer))
    buffer[:4] = b"next"
    found = store.get(name_of(LARGE))
    assert found == LARGE
    assert found is not None and found.readonly


def test_another_digest_is_refused(folder: Path | None) -> None:
    store = BlobStore(folder)
    with pytest.raises(StateError, match="another digest"):
        store.put(name_of(b"other"), DATA)
    assert not store.digests()


def test_what_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)
    store.put(name_of(DATA), DATA)
    fail_at(monkeypatch, "fsync", errno.ENOSPC)
    store.put(name_of(DATA), DATA)
    with pytest.raises(StateError):
        store.put(name_of(LARGE), LARGE)


def test_it_is_there_for_the_next_process(tmp_path: Path) -> None:
    BlobStore(tmp_path).put(name_of(DATA), DATA)
    assert BlobStore(tmp_path).get(name_of(DATA)) == DATA
    assert BlobStore(tmp_path, read_only=True).get(name_of(DATA)) == DATA


def test_any_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, name = BlobStore(tmp_path), name_of(DATA)
    file = tmp_path / name.hex()
    for place in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert store.get(name) is None
        assert not file.exists()
        assert name.hex() in caplog.text
        caplog.clear()
    store.put(name, DATA)
    assert store.get(name) == DATA


@pytest.mark.parametrize("damaged", [b"", DATA[:-1], DATA + b"x"])
def test_a_file_of_another_size_is_noticed_and_put_again(tmp_path: Path, damaged: bytes) -> None:
    store, name = BlobStore(tmp_path), name_of(DATA)
    (tmp_path / name.hex()).write_bytes(damaged)
    store.put(name, DATA)
    assert store.get(name) == DATA
    (tmp_path / name.hex()).write_bytes(damaged)
    assert store.get(name) is None


def test_drafts_of_a_killed_process_are_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put(name_of(DATA), DATA)
    draft, foreign = tmp_path / f".{name_of(LARGE).hex()}.0{files.DRAFT}", tmp_path / "notes.txt"
    draft.write_bytes(LARGE[:1000])
    foreign.write_text("mine")
    assert store.digests() == {name_of(DATA)} and sum(store.sizes()) == len(DATA)
    BlobStore(tmp_path, read_only=True)
    assert draft.exists(), "it may be that of a running peer"
    assert BlobStore(tmp_path).digests() == {name_of(DATA)}
    assert not draft.exists() and foreign.exists()


def test_read_only_changes_nothing(tmp_path: Path) -> None:
    absent = BlobStore(tmp_path / "none", read_only=True)
    assert absent.get(name_of(DATA)) is None and not absent.digests() and sum(absent.sizes()) == 0
    assert not (tmp_path / "none").exists()
    BlobStore(tmp_path).put(name_of(DATA), DATA)
    (tmp_path / name_of(DATA).hex()).write_bytes(b"damaged")
    store = BlobStore(tmp_path, read_only=True)
    assert store.get(name_of(DATA)) is None
    for change in (lambda: store.put(name_of(LARGE), LARGE), lambda: store.drop(name_of(DATA))):
        with pytest.raises(StateError, match="reading only"):
            change()
    assert (tmp_path / name_of(DATA).hex()).read_bytes() == b"damaged"


def test_another_process_looks_while_ours_puts_and_drops(tmp_path: Path) -> None:
    """Nothing it reads is half written, and what vanishes under it is only gone."""
    owner, reader = BlobStore(tmp_path), BlobStore(tmp_path, read_only=True)
    contents = [bytes([number]) * 100_000 for number in range(4)]
    ended = threading.Event()

    def churn() -> None:
        for number in range(120):
            data = contents[number % 4]
            owner.drop(name_of(data)) if owner.has(name_of(data)) else owner.put(name_of(data), data)
        ended.set()

    thread = threading.Thread(target=churn)
    thread.start()
    looks = 0
    while not ended.is_set() or not looks:
        assert sum(reader.sizes()) % 100_000 == 0
        for data in contents:
            assert reader.get(name_of(data)) in (None, data)
        looks += 1
    thread.join()


def test_two_threads_may_put_the_same(tmp_path: Path) -> None:
    store, errors = BlobStore(tmp_path), []
    gate = threading.Barrier(4)

    def put() -> None:
        gate.wait()
        try:
            store.put(name_of(LARGE), LARGE)
        except StateError as error:
            errors.append(error)

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and store.get(name_of(LARGE)) == LARGE
    assert [file.name for file in tmp_path.iterdir()] == [name_of(LARGE).hex()]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "full; free 4 MB"), (errno.EACCES, "not permitted"), (errno.EIO, "Input/output error")],
)
def test_a_failed_write_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    store = BlobStore(tmp_path)
    store.put(name_of(DATA), DATA)
    before = sorted(tmp_path.iterdir())
    fail_at(monkeypatch, call, code)
    with pytest.raises(StateError, match=words) as caught:
        store.put(name_of(LARGE), LARGE)
    assert str(tmp_path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_takes_it_when_there_is_room_again(small_disk: Path) -> None:
    store = BlobStore(small_disk)
    first = os.urandom(1_500_000)
    store.put(name_of(first), first)
    other = os.urandom(1_000_000)
    with pytest.raises(StateError, match="full; free 1 MB"):
        store.put(name_of(other), other)
    assert store.digests() == {name_of(first)} and store.get(name_of(first)) == first
    assert len(list(small_disk.iterdir())) == 1
    store.drop(name_of(first))
    store.put(name_of(other), other)
    assert store.get(name_of(other)) == other


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("")
    with pytest.raises(StateError, match="cannot be opened"):
        BlobStore(tmp_path / "blobs")
    with pytest.raises(StateError, match="cannot be read"):
        BlobStore(tmp_path / "blobs", read_only=True).get(name_of(DATA))
