"""TensorBoard files and W&B runs hold each round once, at its own time, whatever ended the program that wrote them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from metric_samples import record

from p2pllm.errors import UsageError
from p2pllm.metric_names import curves
from p2pllm.metrics import RoundRecord
from p2pllm.sinks import TensorBoardSink, WandbSink

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
masked_crc32c = pytest.importorskip("tensorboardX.record_writer").masked_crc32c


def events(folder: Path) -> list[Any]:
    """All events of a folder in TensorBoard's order, checksums checked."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            body, rest = data[12 : 12 + length], data[12 + length :]
            if len(rest) < 4:
                break  # a torn end, where TensorBoard stops, too
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            assert int.from_bytes(rest[:4], "little") == masked_crc32c(body)
            found.append(event_pb2.Event.FromString(body))
            data = rest[4:]
    return found


def rounds(folder: Path) -> list[int]:
    return [event.step for event in events(folder) if event.HasField("summary")]


def write(folder: Path, *records: RoundRecord) -> list[bool]:
    """What a sink of its own says of each record."""
    sink = TensorBoardSink(folder)
    new = [sink.write(one) for one in records]
    sink.close()
    return new


def test_a_round_is_a_step_with_all_its_curves_at_its_own_time(tmp_path: Path) -> None:
    first, second = record(1, validation_loss=3.25), record(2)
    assert write(tmp_path / "a" / "founder", first, second) == [True, True]
    version, *found = events(tmp_path / "a" / "founder")
    assert version.file_version == "brain.Event:2" and version.wall_time == first.unix_time
    for event, one in zip(found, (first, second), strict=True):
        assert (event.step, event.wall_time) == (one.round, one.unix_time)
        values = {value.tag: value.simple_value for value in event.summary.value}
        assert values == pytest.approx(curves(one), rel=1e-6)


def test_tensorboards_own_reader_shows_the_same(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, record(1), record(2), record(3))
    write(tmp_path, record(2, unix_time=2e9, loss=1.0), record(3, unix_time=2e9 + 2, loss=0.5))
    accumulator = reader.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    scalars = accumulator.Scalars("loss/training")
    assert [(one.step, one.value) for one in scalars] == [(1, 3.5), (2, 1.0), (3, 0.5)]
    assert set(accumulator.Tags()["scalars"]) == set(curves(record(1)))


def test_another_sink_goes_on_and_writes_nothing_twice(tmp_path: Path) -> None:
    write(tmp_path, record(1), record(2))
    assert write(tmp_path, record(1), record(2), record(3)) == [False, False, True]
    assert write(tmp_path, record(1), record(2), record(3)) == [False, False, False]
    assert rounds(tmp_path) == [1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 2  # who has nothing to write makes no file


@pytest.mark.parametrize("cut", [1, 5, 40, 200])
def test_a_round_that_was_half_written_is_written_again(tmp_path: Path, cut: int) -> None:
    write(tmp_path, record(1), record(2))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    assert write(tmp_path, record(1), record(2), record(3)) == [False, True, True]
    assert rounds(tmp_path) == [1, 2, 3]


def test_rounds_of_an_abandoned_branch_are_replaced(tmp_path: Path) -> None:
    other = [record(round_, unix_time=2e9 + round_, loss=9.0) for round_ in (2, 3)]
    write(tmp_path, record(1), record(2), record(3))
    assert write(tmp_path, record(1), record(2), record(3), *other) == [False, False, False, True, True]
    restarts = [event for event in events(tmp_path) if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in restarts] == [(2, event_pb2.SessionLog.START)]
    assert rounds(tmp_path) == [1, 2, 3, 2, 3]
    assert write(tmp_path, *other) == [False, False]


def test_event_files_need_no_torch_and_do_not_hide_it(tmp_path: Path) -> None:
    look = (
        "import sys, importlib.util\n"
        "from pathlib import Path\n"
        "from p2pllm.sinks import TensorBoardSink\n"
        f"TensorBoardSink(Path({str(tmp_path)!r}))\n"
        "print('torch' in sys.modules, importlib.util.find_spec('torch') is not None)\n"
    )
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("False True\n", "")


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("tensorboardX.proto.event_pb2", TensorBoardSink, "tensorboard"),
        ("wandb", lambda folder: WandbSink("p", "g", "i", "n", {}, folder), "wandb"),
    ],
)
def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, make: Callable[[Path], object], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"not installed: pip install -e '\.\[{extra}\]'\.$"):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []


class FakeWandb(SimpleNamespace):
    """What we use of W&B; `step` is where the run on the server is."""

    class Error(Exception):
        pass

    def __init__(self, step: int = 0, refuses: str = "") -> None:
        self.logged = list[tuple[int, dict[str, float]]]()
        self.began = dict[str, Any]()
        self.finished = False

        def init(**arguments: Any) -> Any:
            if refuses:
                raise self.Error(refuses)
            self.began = arguments
            return SimpleNamespace(step=step, log=log, finish=finish)

        def log(values: dict[str, float], step: int, commit: bool) -> None:
            assert commit  # else the newest round would be held back until the next one
            self.logged.append((step, values))

        def finish() -> None:
            self.finished = True

        super().__init__(init=init, Settings=lambda **settings: settings)


def test_wandb_gets_each_round_once_behind_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb(step=3)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink("project", "3d69", "3d69-AAAA", "run/founder", {"name": "run"}, tmp_path)
    other = record(3, unix_time=2e9)
    assert [sink.write(one) for one in (record(1), record(2), record(3), record(4), other, record(5))] == [
        *(False, False, True, True, False, True)
    ]
    assert fake.logged == [(n, curves(record(n)) | {"_timestamp": record(n).unix_time}) for n in (3, 4, 5)]
    assert (fake.began["project"], fake.began["id"], fake.began["resume"]) == ("project", "3d69-AAAA", "allow")
    sink.close()
    assert fake.finished


def test_wandb_without_an_account_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses="No API key configured. Use more\nlines"))
    with pytest.raises(UsageError, match=r"^Weights & Biases does not begin \(No API key configured\); .*offline\.$"):
        WandbSink("p", "g", "i", "n", {}, tmp_path)
