"""Error feedback: nothing is lost between rounds, whatever becomes of them, nor over a restart."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from p2pllm.averaging.feedback import ErrorBuffer
from p2pllm.averaging.sparse import SparseCodec
from p2pllm.errors import StateError
from p2pllm.state import Layout

LAYOUT = Layout.of([("weight", (96, 80)), ("gain", (80,)), ("scale", ())])
CODEC = SparseCodec(LAYOUT)
RUN = "ab" * 32


def delta_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32)


def dense(payload: bytes) -> np.ndarray:
    update = CODEC.decode(payload)
    vector = np.zeros(LAYOUT.size, np.float32)
    vector[update.positions] = update.values
    return vector


def filled(*seeds: int) -> ErrorBuffer:
    buffer = ErrorBuffer(CODEC, RUN)
    for seed in seeds:
        buffer.compress(delta_of(seed))
        buffer.commit()
    return buffer


def test_a_round_as_in_the_paper() -> None:
    buffer = ErrorBuffer(CODEC, RUN, decay=0.5)
    first = dense(buffer.compress(delta_of(1)))
    buffer.commit()
    np.testing.assert_array_equal(buffer.error, delta_of(1) - first)
    second = dense(buffer.compress(delta_of(2)))
    buffer.commit()
    np.testing.assert_array_equal(buffer.error, np.float32(0.5) * (delta_of(1) - first) + delta_of(2) - second)


def test_what_is_sent_adds_up_to_what_was_given() -> None:
    """Without decay the sums differ by the error alone, which stays bounded while they grow."""
    buffer = ErrorBuffer(CODEC, RUN, decay=np.nextafter(1, 0, dtype=np.float32))
    constant, given, sent = delta_of(0), np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    shares = []
    for _ in range(300):
        given += constant
        sent += dense(buffer.compress(constant))
        buffer.commit()
        shares.append(np.linalg.norm(given - sent) / np.linalg.norm(given))
    np.testing.assert_allclose(given - sent, buffer.error, atol=2e-2)
    assert shares[0] > 0.8
    assert shares[-1] < 0.25
    without = 300 * dense(CODEC.encode(constant))
    assert shares[-1] < 0.4 * np.linalg.norm(given - without) / np.linalg.norm(given)


def test_rounds_that_fail_lose_nothing_and_diminish_nothing() -> None:
    buffer = ErrorBuffer(CODEC, RUN, decay=0.5)
    lost = buffer.compress(delta_of(1))
    np.testing.assert_array_equal(buffer.error, delta_of(1))
    again = buffer.compress(np.zeros_like(delta_of(1)))
    assert again == lost
    buffer.compress(delta_of(2))
    sent = buffer.compress(np.zeros_like(delta_of(1)))
    np.testing.assert_array_equal(buffer.error, delta_of(1) + delta_of(2))
    buffer.commit()
    buffer.commit()  # a second time nothing happens
    left = delta_of(1) + delta_of(2) - dense(sent)
    np.testing.assert_array_equal(buffer.error, left)
    buffer.compress(delta_of(3))
    np.testing.assert_array_equal(buffer.error, np.float32(0.5) * left + delta_of(3))


def test_what_was_not_committed_comes_back_from_the_disk_undiminished(tmp_path: Path) -> None:
    buffer = ErrorBuffer(CODEC, RUN, decay=0.5)
    buffer.compress(delta_of(1))
    buffer.save(tmp_path / "error")
    loaded = ErrorBuffer(CODEC, RUN, decay=0.5)
    assert loaded.load(tmp_path / "error")
    loaded.compress(delta_of(2))
    np.testing.assert_array_equal(loaded.error, delta_of(1) + delta_of(2))


def test_error_is_read_only_and_delta_is_left_alone() -> None:
    buffer, delta = ErrorBuffer(CODEC, RUN), delta_of(1)
    buffer.compress(delta)
    np.testing.assert_array_equal(delta, delta_of(1))
    with pytest.raises(ValueError, match="read-only"):
        buffer.error[0] = 1


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 2e30, -2e30])
def test_a_number_that_cannot_be_added_changes_nothing(wrong: float) -> None:
    buffer = filled(1)
    payload = buffer.compress(delta_of(2))
    before, bad = buffer.error.copy(), delta_of(3)
    bad[5] = wrong
    with pytest.raises(ValueError, match="not finite, or is far too large"):
        buffer.compress(bad)
    np.testing.assert_array_equal(buffer.error, before)
    buffer.commit()
    np.testing.assert_array_equal(buffer.error, before - dense(payload))


def test_refuses_another_shape_type_or_decay() -> None:
    for delta in (np.zeros(3, np.float32), np.zeros(LAYOUT.size)):
        with pytest.raises(ValueError, match="not as its layout"):
            ErrorBuffer(CODEC, RUN).compress(delta)
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="below 1"):
            ErrorBuffer(CODEC, RUN, decay)


def test_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "error.safetensors"
    buffer = filled(1, 2)
    buffer.save(path)
    saved = buffer.error.copy()
    other = filled(3)
    assert other.load(path)
    np.testing.assert_array_equal(other.error, buffer.error)
    assert other.compress(delta_of(4)) == buffer.compress(delta_of(4))
    np.testing.assert_array_equal(load_file(path)["error"], saved)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_was_not_committed_is_saved_as_not_sent(tmp_path: Path) -> None:
    buffer, other = filled(1), ErrorBuffer(CODEC, RUN)
    buffer.compress(delta_of(2))
    buffer.save(tmp_path / "error")
    assert other.load(tmp_path / "error")
    np.testing.assert_array_equal(other.error, buffer.error)


def test_who_saves_waits_for_a_compression_in_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that has to leave at once saves while its update is packed: the file has all of it, and was not sent."""
    buffer, other = filled(1), ErrorBuffer(CODEC, RUN)
    encoding, go_on = threading.Event(), threading.Event()
    encode = CODEC.encode

    def slow(vector: np.ndarray) -> bytes:
        encoding.set()
        assert go_on.wait(30)
        return encode(vector)

    monkeypatch.setattr(CODEC, "encode", slow)
    with ThreadPoolExecutor(2) as threads:
        packed = threads.submit(buffer.compress, delta_of(2))
        assert encoding.wait(30)
        saved = threads.submit(buffer.save, tmp_path / "error")
        assert not wait([saved], timeout=0.2).done
        go_on.set()
        packed.result(30)
        saved.result(30)
    assert other.load(tmp_path / "error")
    np.testing.assert_array_equal(other.error, buffer.error)


def test_a_file_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = filled(1)
    with caplog.at_level(logging.INFO):
        assert not buffer.load(tmp_path / "error")
    assert not buffer.error.any()
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("place", [0, 7, 30, 120, 300, -4000, -1])
def test_a_damaged_file(tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture) -> None:
    path, buffer = tmp_path / "error", filled(1)
    buffer.save(path)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    assert_unused(buffer, path, "damaged", caplog)


@pytest.mark.parametrize("change", [-1, -5000, 1])
def test_a_file_of_another_length(tmp_path: Path, change: int, caplog: pytest.LogCaptureFixture) -> None:
    path, buffer = tmp_path / "error", filled(1)
    buffer.save(path)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    assert_unused(buffer, path, "bytes instead of", caplog)


def test_a_file_of_another_run_or_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "error"
    ErrorBuffer(CODEC, "cd" * 32).save(path)
    assert_unused(filled(1), path, "of another run", caplog)
    turned = Layout.of([("weight", (80, 96)), ("gain", (80,)), ("scale", ())])
    ErrorBuffer(SparseCodec(turned), RUN).save(path)
    assert_unused(filled(1), path, "of another run", caplog)


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_unused(filled(1), tmp_path, "", caplog)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match="cannot be saved"):
        filled(1).save(tmp_path / "file" / "error")


def assert_unused(buffer: ErrorBuffer, path: Path, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    assert not buffer.load(path)
    assert not buffer.error.any()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(path) in record.getMessage() and reason in record.getMessage()
    buffer.compress(delta_of(5))
    buffer.commit()
    assert buffer.error.any()
