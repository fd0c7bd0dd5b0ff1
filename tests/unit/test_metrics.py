"""Records of rounds survive as lines of JSON, also behind a line that a killed process left half written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from p2pllm.metrics import JsonlSink, RoundRecord

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
