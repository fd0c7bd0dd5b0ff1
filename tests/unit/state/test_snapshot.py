"""Snapshots: round trips, damage, full and forbidden disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from p2pllm.errors import StateError
from p2pllm.state import FLOAT, Layout, SharedState, newest, save, snapshot

RUN = "ab" * 32
LAYOUT = Layout.of([("weight", (30, 40)), ("bias", (40,))])


def state_of(round_: int) -> SharedState:
    values = np.random.default_rng(round_).standard_normal((3, LAYOUT.size)).astype(FLOAT)
    return SharedState(LAYOUT, values[0], values[1], values[2] ** 2, round=round_, beta_powers=(0.5, 0.25))


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = state_of(5)
    file = save(tmp_path, saved, RUN)
    out = np.zeros(LAYOUT.size, FLOAT)
    loaded = newest(tmp_path, RUN, LAYOUT, out)
    assert loaded is not None and loaded.params is out
    assert loaded.digest() == saved.digest()
    found = newest(tmp_path, RUN)
    assert found is not None and found.layout == LAYOUT
    assert np.array_equal(load_file(file)["params"], saved.params), "others can read the format"


def test_only_the_last_ones_are_kept_and_other_runs_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, state_of(9), "cd" * 32)
    for round_ in range(1, 5):
        save(tmp_path, state_of(round_), RUN, keep=2)
    assert sorted(file.name.split("-round-")[1] for file in tmp_path.iterdir()) == [
        f"{round_}.safetensors" for round_ in (3, 4, 9)
    ]


def test_the_last_saved_counts_even_if_its_round_is_lower(tmp_path: Path) -> None:
    """Who yields a lighter branch goes back to an earlier round, and must not wake up on the lighter one."""
    save(tmp_path, state_of(9), RUN)
    save(tmp_path, state_of(7), RUN)
    loaded = newest(tmp_path, RUN)
    assert loaded is not None and loaded.round == 7


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", RUN) is None
    assert newest(tmp_path, RUN) is None


@given(place=st.floats(0, 0.999), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path: Path, place: float, bit: int) -> None:
    save(tmp_path, state_of(1), RUN)
    file = save(tmp_path, state_of(2), RUN)
    raw = bytearray(file.read_bytes())
    raw[int(place * len(raw))] ^= 1 << bit
    file.write_bytes(raw)
    loaded = newest(tmp_path, RUN, LAYOUT)
    assert loaded is not None
    assert loaded.digest() == state_of(loaded.round).digest()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_torn_file_is_skipped_with_a_warning(tmp_path: Path, part: float, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, state_of(1), RUN)
    file = save(tmp_path, state_of(2), RUN)
    os.truncate(file, int(part * file.stat().st_size))
    loaded = newest(tmp_path, RUN, LAYOUT)
    assert loaded is not None and loaded.round == 1
    assert file.name in caplog.text


def test_only_damaged_files_are_as_good_as_none(tmp_path: Path) -> None:
    file = save(tmp_path, state_of(2), RUN)
    file.write_bytes(b"nonsense")
    out = np.full(LAYOUT.size, 7, FLOAT)
    assert newest(tmp_path, RUN, LAYOUT, out) is None
    assert (out == 7).all()


def test_a_file_of_another_run_or_layout_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save(tmp_path, state_of(2), RUN[:16] + "00" * 24)
    assert newest(tmp_path, RUN) is None
    assert "another run" in caplog.text
    file.unlink()
    save(tmp_path, state_of(2), RUN)
    assert newest(tmp_path, RUN, Layout.of([("other", (LAYOUT.size,))])) is None
    assert "another layout" in caplog.text


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops the write half-way, as a full disk does."""
    save(tmp_path, state_of(1), RUN)
    before = sorted(tmp_path.iterdir())
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from p2pllm.errors import StateError\n"
        "from p2pllm.state import Layout, SharedState, save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "state = SharedState.initial(Layout.of([('a', (5000,))]), np.zeros(5000, np.float32))\n"
        "try:\n    save(Path(sys.argv[1]), state, sys.argv[2])\n"
        "except StateError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, RUN], capture_output=True, text=True, timeout=60)
    assert "full" in done.stdout and str(tmp_path) in done.stdout, done.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert newest(tmp_path, RUN) is not None


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "full; free"), (errno.EACCES, "not permitted"), (errno.EIO, "Input/output error")],
)
def test_a_failed_write_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    save(tmp_path, state_of(1), RUN)
    before = sorted(tmp_path.iterdir())

    def fail(_handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(snapshot.os, "fsync", fail)
    with pytest.raises(StateError, match=words) as caught:
        save(tmp_path, state_of(2), RUN)
    assert str(tmp_path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    file = save(tmp_path, state_of(1), RUN)
    leftover = tmp_path / f".{file.name}.tmp"
    leftover.write_bytes(b"half")
    save(tmp_path, state_of(2), RUN)
    assert not leftover.exists()


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("")
    with pytest.raises(StateError, match="cannot be saved"):
        save(tmp_path / "states", state_of(1), RUN)
    with pytest.raises(StateError, match="cannot be read"):
        newest(tmp_path / "states", RUN)
