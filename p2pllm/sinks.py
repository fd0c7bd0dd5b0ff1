"""Where records and readings go: Prometheus' text format, TensorBoard's event files, and Weights & Biases.

What lives here: each tool's format. Names and units come from the one table, `metric_names`. What does not: finding the
peers of a machine and following their files (`p2pllm_peers.exporter`). JSON lines are `metrics.JsonlSink`.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from p2pllm.errors import UsageError
from p2pllm.metric_names import LABELS, METRICS, curves
from p2pllm.metrics import RoundRecord
from p2pllm.tally import Reading

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")

_PRIVATE = {
    "console": "off",
    "disable_git": True,
    "host": "-",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""Settings of W&B: rounds are to be shown, not the volunteer's machine."""


class RecordSink(Protocol):
    """Takes the records of one peer, in the order in which it wrote them."""

    def write(self, record: RoundRecord) -> bool:
        """Take one record; whether it was new here."""

    def close(self) -> None:
        """Finish what was written."""


class PrometheusCollector(Collector):
    """What a prometheus_client registry asks at every scrape."""

    def __init__(self, look: Callable[[], Iterable[Reading]]) -> None:
        """look: the readings of all peers as they are now."""
        self._look = look

    def describe(self) -> Iterable[Family]:
        """Nothing: to register must not ask every daemon."""
        return ()

    def collect(self) -> Iterator[Family]:
        """All metrics of the table, one family each."""
        readings = list(self._look())
        for metric in METRICS:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.meaning, labels=[*LABELS, *metric.labels])
            for reading in readings:
                for values, number in metric.read(reading).items():
                    family.add_metric([reading.run, reading.peer, *values], number)
            yield family


class TensorBoardSink:
    """Event files of one peer, a round a step, at the time when the peer recorded it.

    What is in the folder already is not written again, so that a sink goes on where another one ended, however that
    did. A round that comes again, after a partition in which this peer was on the lighter side, replaces the first.
    """

    def __init__(self, folder: Path) -> None:
        """folder: of this peer alone.

        Raises UsageError without tensorboardX, or while another program writes there; OSError if it cannot be used.
        """
        with _without_torch():
            self._proto = _load("tensorboardX.proto.event_pb2", "TensorBoard files", "tensorboard")
            self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
            self._records = importlib.import_module("tensorboardX.record_writer")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = _locked(folder)
        self._written = list(self._read_back())
        self._known = set(self._written)
        self._step = self._written[-1][0] if self._written else 0
        self._writer: Any = None

    def write(self, record: RoundRecord) -> bool:
        """Write one round as one event, so that it is there as a whole or not at all."""
        key = (record.round, record.unix_time)
        if key in self._known:
            return False
        if self._writer is None:
            self._writer = self._new_file()
            self._put(record, file_version="brain.Event:2")
        if record.round <= self._step:  # that is how TensorBoard is told to forget this step and those after it
            self._put(record, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in curves(record).items()]
        self._put(record, summary=self._summary(value=values))
        self._writer.flush()
        self._known.add(key)
        self._step = record.round
        return True

    def close(self) -> None:
        """Close the file, and let others write."""
        if self._writer is not None:
            self._writer.close()
        self._lock.close()

    def _put(self, record: RoundRecord, **what: Any) -> None:
        event = self._proto.Event(wall_time=record.unix_time, step=record.round, **what)
        self._writer.write(event.SerializeToString())

    def _new_file(self) -> Any:
        """TensorBoard reads files in the order of their names, and each to its end: hence numbers, not times."""
        numbers = [int(path.name.rsplit(".", 1)[1]) for path in self._files()]
        name = f"events.out.tfevents.p2pllm.{max(numbers, default=0) + 1:06d}"
        return self._records.RecordWriter(str(self._folder.resolve() / name))

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("events.out.tfevents.p2pllm." + "[0-9]" * 6))

    def _read_back(self) -> Iterator[tuple[int, float]]:
        """(round, time) of every round in the folder, as they were written."""
        for path in self._files():
            for data in _events(path):
                event = self._proto.Event.FromString(data)
                if event.HasField("summary"):
                    yield event.step, event.wall_time


def _locked(folder: Path) -> ExitStack:
    """The folder for us alone, until this is closed or we die. Raises UsageError while another program has it."""
    held = ExitStack()
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    held.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise UsageError(f"In {folder} another program writes already; end it or choose another folder.") from None
    except OSError:
        pass  # a file system without locks; whoever starts two programs there has each round twice
    return held


@contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch where it finds it, for pictures that we do not draw: 1.4 s and 200 MB for nothing."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # which is how Python marks what cannot be imported
    try:
        yield
    finally:
        del sys.modules["torch"]


def _events(path: Path) -> Iterator[bytes]:
    """The events of a file, up to one that a killed process left half written.

    Each is its length, a checksum of that, itself, and its checksum; TensorBoard stops at the same place.
    """
    with path.open("rb") as file:
        left = path.stat().st_size
        while left >= _LENGTH.size:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            left -= _LENGTH.size + length + 2 * _CHECKSUM.size
            if left < 0:
                return
            file.seek(_CHECKSUM.size, 1)
            data = file.read(length)
            file.seek(_CHECKSUM.size, 1)
            yield data


class WandbSink:
    """One peer's run in Weights & Biases, a round a step.

    A run that is on the server already goes on behind its last step. A step cannot be taken back there: what a peer on
    the lighter side of a partition showed stays, and its rounds go on behind that.
    """

    def __init__(self, project: str, group: str, run_id: str, name: str, config: dict[str, Any], folder: Path) -> None:
        """group: the same for all peers of a run. run_id: the same whenever it is this peer. folder: for W&B's files.

        Raises UsageError without wandb, and if it cannot begin, as without an account.
        """
        wandb = _load("wandb", "Weights & Biases", "wandb")
        try:
            self._run: Any = wandb.init(
                project=project,
                group=group,
                id=run_id,
                name=name,
                config=config,
                dir=str(folder),
                resume="allow",
                settings=wandb.Settings(**_PRIVATE),
            )
        except wandb.Error as error:
            reason = f"{error}\n".splitlines()[0].partition(". ")[0].rstrip(".")
            raise UsageError(
                f"Weights & Biases does not begin ({reason}); log in with `wandb login`, or set WANDB_MODE=offline."
            ) from None
        self._next = int(self._run.step)

    def write(self, record: RoundRecord) -> bool:
        """Log one round."""
        if record.round < self._next:
            return False
        self._run.log({**curves(record), "_timestamp": record.unix_time}, step=record.round, commit=True)
        self._next = record.round + 1
        return True

    def close(self) -> None:
        """Finish the run; waits until all of it is sent."""
        self._run.finish()


def _load(module: str, what: str, extra: str) -> ModuleType:
    """Import what only an extra installs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        needs = module.partition(".")[0]
        raise UsageError(f"{what} need {needs}, which is not installed: pip install -e '.[{extra}]'.") from None
