"""Followers of a peer's files and daemons: whatever happens to these, a record is told once, and a scrape answers."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from metric_samples import RUN_ID, STATUS, answering, append, make_peer, occupy, record
from prometheus_client.parser import text_string_to_metric_families

from p2pllm.errors import UsageError
from p2pllm.metric_names import METRICS
from p2pllm.metrics import JsonlSink, RoundRecord, record_files
from p2pllm.tally import Reading
from p2pllm_peers import exporter
from p2pllm_peers.control import ControlServer
from p2pllm_peers.exporter import Export, MetricsServer, Readings, RecordFile, stream


@pytest.fixture
def sockets() -> Iterator[Path]:
    """Short: the path of a Unix socket has about a hundred bytes."""
    with tempfile.TemporaryDirectory(prefix="p2pllm-") as folder:
        yield Path(folder)


class Followed:
    """A file of records and what was read of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.anew = 0
        self._file = RecordFile(path, self._on_anew)

    def _on_anew(self) -> None:
        self.anew += 1

    def news(self) -> list[int]:
        return [one.round for one in self._file.news()]

    def add(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    return Followed(tmp_path / "rounds.jsonl")


def lines(*rounds: int) -> str:
    return "".join(record(round_).to_json() + "\n" for round_ in rounds)


def test_a_file_that_does_not_exist_yet_and_then_grows(followed: Followed) -> None:
    assert followed.news() == []
    followed.add(lines(1, 2))
    assert (followed.news(), followed.news()) == ([1, 2], [])
    followed.add(lines(3))
    assert (followed.news(), followed.anew) == ([3], 0)


def test_a_line_counts_when_it_is_whole(followed: Followed) -> None:
    text = lines(1, 2)
    followed.add(text[:-30])
    assert followed.news() == [1]
    followed.add(text[-30:-1])
    assert followed.news() == []
    followed.add(text[-1:])
    assert (followed.news(), followed.anew) == ([2], 0)


def test_half_a_line_of_a_killed_daemon_is_passed_over_when_the_next_one_goes_on(followed: Followed) -> None:
    followed.add(lines(1) + lines(2)[:-50])
    assert followed.news() == [1]
    sink = JsonlSink(followed.path)  # as a daemon that starts again does
    sink.write(record(3))
    sink.close()
    assert followed.news() == [3]


@pytest.mark.parametrize("line", ["nonsense", "{}", "[]", "null", '{"round":7}', "\x00" * 50, '{"round":"x"' + "}" * 9])
def test_a_damaged_line_is_passed_over(followed: Followed, line: str) -> None:
    followed.add(lines(1) + line + "\n" + lines(2))
    assert followed.news() == [1, 2]


def test_what_a_newer_version_adds_is_no_damage(followed: Followed) -> None:
    followed.add(lines(1).replace("{", '{"mood":"good",', 1))
    assert followed.news() == [1]


@pytest.mark.parametrize("after", [(7,), (7, 8, 9)], ids=["shorter", "longer"])
def test_a_file_that_begins_anew_is_read_from_there(followed: Followed, after: tuple[int, ...]) -> None:
    followed.add(lines(1, 2))
    assert followed.news() == [1, 2]
    followed.path.write_text(lines(*after))
    assert (followed.news(), followed.anew) == (list(after), 1)


def test_a_file_that_goes_away_and_comes_back(followed: Followed) -> None:
    followed.add(lines(1))
    assert followed.news() == [1]
    followed.path.unlink()
    assert (followed.news(), followed.news(), followed.anew) == ([], [], 1)
    followed.add(lines(1, 2))
    assert (followed.news(), followed.anew) == ([1, 2], 1)


def test_a_stream_goes_on_while_it_is_waited_for(tmp_path: Path) -> None:
    first, second = make_peer(tmp_path, "founder"), make_peer(tmp_path, "volunteer")
    append(first, record(1))
    steps = iter([lambda: append(second, record(1)), lambda: append(first, record(2), record(3), end="{")])

    def wait() -> None:
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    found = list[tuple[str, int]]()
    with pytest.raises(KeyboardInterrupt):
        for peer, one in stream([first, second], wait):
            found.append((peer.name, one.round))
    assert found == [("founder", 1), ("volunteer", 1), ("founder", 2), ("founder", 3)]


def test_an_export_counts_what_was_new(tmp_path: Path) -> None:
    class Odd:
        """Has the even rounds already."""

        def __init__(self) -> None:
            self.closed = False

        def write(self, one: RoundRecord) -> bool:
            return bool(one.round % 2)

        def close(self) -> None:
            self.closed = True

    peer, sink = make_peer(tmp_path), Odd()
    append(peer, record(1), record(2), record(3))
    export = Export({peer: sink})
    export.run()
    assert export.written == 2
    export.close()
    assert sink.closed


def by_peer(readings: list[Reading]) -> dict[str, tuple[bool, int]]:
    """Name -> whether its daemon answers, and how many rounds it recorded."""
    return {reading.peer: (reading.status is not None, reading.tally.rounds) for reading in readings}


async def test_readings_follow_a_machine(tmp_path: Path, sockets: Path) -> None:
    readings = Readings(tmp_path)
    assert readings() == []  # nothing was ever joined here
    running, stopped = make_peer(tmp_path), make_peer(tmp_path, "volunteer")
    append(running, record(1))
    server = ControlServer(sockets / "a.sock", {"status": answering(STATUS)})
    await server.start()
    handle = occupy(running, sockets / "a.sock")
    assert by_peer(await asyncio.to_thread(readings)) == {"founder": (True, 1), "volunteer": (False, 0)}
    append(running, record(2))
    append(stopped, record(1), record(2), record(3))
    (reading, _) = await asyncio.to_thread(readings)
    assert (reading.run, reading.status, reading.tally.rounds) == (RUN_ID, STATUS, 2)
    await server.close()
    os.close(handle)
    (stopped.path / "rounds.jsonl").write_text(lines(1))
    assert by_peer(await asyncio.to_thread(readings)) == {"founder": (False, 2), "volunteer": (False, 1)}
    shutil.rmtree(stopped.path)
    assert by_peer(readings()) == {"founder": (False, 2)}


async def test_a_daemon_that_refuses_or_is_starting_is_not_up(tmp_path: Path, sockets: Path) -> None:
    peer, starting = make_peer(tmp_path), make_peer(tmp_path, "volunteer")
    server = ControlServer(sockets / "a.sock", {})
    await server.start()
    handles = [occupy(peer, sockets / "a.sock"), starting.lock()]
    assert by_peer(await asyncio.to_thread(Readings(tmp_path))) == {"founder": (False, 0), "volunteer": (False, 0)}
    await server.close()
    for handle in handles:
        os.close(handle)


def test_a_frozen_daemon_holds_up_a_scrape_for_a_bounded_time(
    tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "ANSWER_S", 0.05)
    peer = make_peer(tmp_path)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(sockets / "a.sock"))
        deaf.listen()
        handle = occupy(peer, sockets / "a.sock")
        assert by_peer(Readings(tmp_path)()) == {"founder": (False, 0)}
        os.close(handle)


def scrape(server: MetricsServer) -> dict[str, list[dict[str, Any]]]:
    """Name -> samples, as Prometheus reads them."""
    with urllib.request.urlopen(server.url, timeout=10) as reply:  # noqa: S310 - our own server
        assert reply.headers["Content-Type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(reply.read().decode())
    found = dict[str, list[dict[str, Any]]]()
    for family in families:
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, []).append({**sample.labels, "value": sample.value})
    return found


async def test_prometheus_gets_all_peers_of_the_machine(tmp_path: Path, sockets: Path) -> None:
    peer = make_peer(tmp_path)
    append(make_peer(tmp_path, "volunteer"), record(1))
    append(peer, record(1, validation_loss=3.0), record(2))
    control = ControlServer(sockets / "a.sock", {"status": answering(STATUS)})
    await control.start()
    handle = occupy(peer, sockets / "a.sock")
    server = MetricsServer(tmp_path, "127.0.0.1", 0)
    found = await asyncio.to_thread(scrape, server)
    assert set(found) == {metric.name for metric in METRICS}
    assert {one["peer"]: one["value"] for one in found["p2pllm_up"]} == {"founder": 1, "volunteer": 0}
    assert {one["peer"]: one["value"] for one in found["p2pllm_recorded_rounds_total"]} == {
        "founder": 2,
        "volunteer": 1,
    }
    assert {one["run"] for one in found["p2pllm_up"]} == {RUN_ID}
    append(peer, record(3))
    again = await asyncio.to_thread(scrape, server)
    assert {one["value"] for one in again["p2pllm_last_round_number"]} == {1, 3}
    await asyncio.to_thread(server.close)
    os.close(handle)
    await control.close()


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    server = MetricsServer(tmp_path, "127.0.0.1", 0)
    with pytest.raises(UsageError, match=rf"^Nothing can listen on 127.0.0.1 port {server.port} \(.*--port\.$"):
        MetricsServer(tmp_path, "127.0.0.1", server.port)
    server.close()


def test_an_address_that_is_not_ours_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose others with --host"):
        MetricsServer(tmp_path, "203.0.113.9", 0)  # an address for documentation, which nobody has


@pytest.mark.parametrize("every", [1, 2, 3, 5, 11])
def test_records_are_told_once_over_files_that_are_put_away(followed: Followed, every: int) -> None:
    sink = JsonlSink(followed.path, file_bytes=3 * len(record(10).to_json()))
    told = list[int]()
    for round_ in range(1, 41):
        sink.write(record(round_, unix_time=float(round_)))
        if round_ % every == 0:
            told += followed.news()
    told += followed.news()
    sink.close()
    assert told == list(range(1, 41)) and followed.anew == 0


def late_rounds(path: Path) -> list[int]:
    """What all files have, the oldest first."""
    texts = [file.read_text() for file in reversed(record_files(path)) if file.exists()]
    return [RoundRecord.from_json(line).round for text in texts for line in text.splitlines()]


def test_who_comes_late_gets_all_that_is_kept(followed: Followed) -> None:
    sink = JsonlSink(followed.path, file_bytes=1)
    for round_ in range(1, 10):
        sink.write(record(round_))
    sink.close()
    assert followed.news() == late_rounds(followed.path) == [5, 6, 7, 8, 9]


def test_who_was_away_for_longer_than_files_are_kept_begins_anew(followed: Followed) -> None:
    sink = JsonlSink(followed.path, file_bytes=1)
    sink.write(record(1))
    assert followed.news() == [1]
    for round_ in range(2, 10):
        sink.write(record(round_))
    sink.close()
    assert followed.news() == [5, 6, 7, 8, 9] and followed.anew == 1


def test_a_file_that_is_put_away_while_files_are_opened(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = JsonlSink(followed.path, file_bytes=1)
    for round_ in range(1, 4):
        sink.write(record(round_))
    opened, once = Path.open, [True]

    def opening(path: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(path, *arguments, **options)
        if path == followed.path and once:
            once.clear()
            sink.write(record(4))
        return file

    with monkeypatch.context() as racing:
        racing.setattr(Path, "open", opening)
        assert followed.news() == [1, 2, 3]
    sink.close()
    assert followed.news() == [4] and followed.anew == 0


def test_the_time_between_putting_away_and_the_first_record(followed: Followed) -> None:
    followed.add(lines(1, 2))
    assert followed.news() == [1, 2]
    followed.path.rename(record_files(followed.path)[1])
    assert followed.news() == [] and followed.anew == 0
    followed.add(lines(3))
    assert followed.news() == [3] and followed.anew == 0
