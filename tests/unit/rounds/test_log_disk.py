"""A log on a disk that fails, beside other processes, and after kill -9."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from log_samples import FOUNDER, OTHER_RUN, RUN, START, after, filled, grown, last_checkpoint, last_record, opened, seen

from p2pllm.errors import StateError
from p2pllm.rounds import frames
from p2pllm.rounds.chain import start_of
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.record import genesis


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
        patch.setattr(frames.os, call, failing(code, os.pwrite if call == "pwrite" else None))
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
        patch.setattr(frames.os, "pwrite", failing(errno.EIO, os.pwrite))
        patch.setattr(frames.os, "ftruncate", failing(errno.EIO))
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
    monkeypatch.setattr(frames.os, "open", failing(errno.EACCES))
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


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from log_samples import after, opened
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
