"""Records of rounds survive as lines of JSON, also behind a line that a killed process left half written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from p2pllm.metrics import KEPT_FILES, JsonlSink, RoundRecord, record_files

RECORD = RoundRecord(
    round=3,
    unix_time=1.5,
    samples=12,
    tokens=1536,
    members={"a": 8, "b": 4},
    loss=2.5,
    validation_loss=None,
    learning_rate=1e-3,
    record_digest="22",
    aggregate_digest="00",
    state_digest="11",
    attempts=1,
    own_steps=[4, 4],
    bytes_sent=10,
    bytes_received=20,
    seconds={"exchange": 0.25},
)


def test_a_record_is_one_line_with_all_its_fields() -> None:
    line = RECORD.to_json()
    assert "\n" not in line
    assert RoundRecord(**json.loads(line)) == RECORD


def test_a_reader_sees_a_record_at_once_and_a_new_sink_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    for number in (1, 2):
        sink = JsonlSink(path)
        sink.write(replace(RECORD, round=number))
        assert [json.loads(line)["round"] for line in path.read_text().splitlines()][-1] == number
        sink.close()
    assert len(path.read_text().splitlines()) == 2


def test_half_a_line_swallows_no_record(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round":1}\n{"rou')
    sink = JsonlSink(path)
    sink.write(RECORD)
    sink.close()
    first, torn, last = path.read_text().splitlines()
    assert (first, torn, last) == ('{"round":1}', '{"rou', RECORD.to_json())


def numbered(round_: int) -> RoundRecord:
    return replace(RECORD, round=round_)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_reported_once_a_record_and_does_not_spoil_the_end(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.symlink_to("/dev/full")
    sink = JsonlSink(path)
    with pytest.raises(OSError, match="No space"):
        sink.write(RECORD)
    sink.close()


def test_full_files_are_put_away_and_a_bounded_number_stays(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    size = len(RECORD.to_json())
    sink = JsonlSink(path, file_bytes=3 * size)
    for round_ in range(1, 101):
        sink.write(numbered(round_))
        assert path.stat().st_size > 0, "the newest is always in the first file"
        if round_ == 50:  # a restart in between
            sink.close()
            sink = JsonlSink(path, file_bytes=3 * size)
    sink.close()
    assert sorted(tmp_path.iterdir()) == sorted(record_files(path)) and len(record_files(path)) == KEPT_FILES + 1
    assert all(file.stat().st_size <= 5 * size for file in record_files(path))
    found = [json.loads(line)["round"] for file in reversed(record_files(path)) for line in file.open()]
    assert found == list(range(101 - len(found), 101))


def test_a_disk_that_makes_no_new_file_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rounds.jsonl"
    sink = JsonlSink(path, file_bytes=1)
    sink.write(numbered(1))
    with monkeypatch.context() as full:
        full.setattr(JsonlSink, "_opened", refuses)
        sink.write(numbered(2))
        sink.write(numbered(3))
    sink.write(numbered(4))
    sink.close()
    found = [file.read_text().count("\n") for file in record_files(path) if file.exists()]
    assert found == [1, 3]


def refuses(sink: JsonlSink) -> None:
    raise OSError(28, "No space left on device")
