"""Exporter: follows the records of this machine's peers and asks their daemons, for other people's tools.

It is a process of its own, so it costs the daemons nothing but an answer to `status`. What does not live here: what the
numbers are called (`p2pllm.metric_names`), and the formats of the tools (`p2pllm.sinks`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from p2pllm.errors import DaemonError, UsageError
from p2pllm.identity import Identity
from p2pllm.metrics import RoundRecord, record_files
from p2pllm.sinks import PrometheusCollector, RecordSink, WandbSink
from p2pllm.tally import Reading, Status, Tally
from p2pllm_peers.control import ask
from p2pllm_peers.folders import PeerFolder, all_runs
from p2pllm_peers.housekeeping import run_name

ANSWER_S = 2.0
"""How long a daemon may take to answer; one that is frozen must not cost the others their scrape."""

ASKED_AT_ONCE = 8

_KEPT = 64
"""At least so many bytes before our place, and the whole last line, show that a file is still the same."""


class RecordFile:
    """Follows one peer's rounds.jsonl, which may not exist yet, grow, be put away, end in half a line or begin anew."""

    def __init__(self, path: Path, on_anew: Callable[[], None] = lambda: None) -> None:
        """on_anew: called when the file is another one than before, so that its records come from the beginning."""
        self._path = path
        self._on_anew = on_anew
        self._place = 0
        self._before = b""

    def news(self) -> Iterator[RoundRecord]:
        """The records that were added since the last time. Raises OSError if the file cannot be read."""
        with ExitStack() as opened:
            files = self._files(opened)
            if not files or (self._before and not self._goes_on(files[0])):
                self._begin_anew()
            for file in files:
                if file is not files[0]:
                    self._place, self._before = 0, b""
                file.seek(self._place)
                yield from self._records(file)

    def _files(self, opened: ExitStack) -> list[BinaryIO]:
        """From the one where we are, or if that is gone from the oldest, to the newest.

        They are opened the other way round: one that is put away meanwhile is seen twice then, and not missed.
        """
        found = dict[int, BinaryIO]()
        for path in record_files(self._path):
            try:
                file = opened.enter_context(path.open("rb"))
            except FileNotFoundError:
                continue
            found.setdefault(os.fstat(file.fileno()).st_ino, file)
            if self._before and self._goes_on(file):
                break
        return list(reversed(found.values()))

    def _records(self, file: BinaryIO) -> Iterator[RoundRecord]:
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written; after a crash it gets an end, and is no record
            self._place += len(line)
            self._before = (self._before + line)[-max(_KEPT, len(line)) :]
            try:
                record = RoundRecord.from_json(line)
            except ValueError:
                continue  # half a line of a killed daemon
            yield record

    def _goes_on(self, file: BinaryIO) -> bool:
        file.seek(self._place - len(self._before))
        return file.read(len(self._before)) == self._before

    def _begin_anew(self) -> None:
        if self._place:
            self._place, self._before = 0, b""
            self._on_anew()


def stream(
    peers: Sequence[PeerFolder], wait: Callable[[], object] | None = None
) -> Iterator[tuple[PeerFolder, RoundRecord]]:
    """The records of these peers, each peer's in order; with `wait`, called when there are no more, for good."""
    files = [(peer, RecordFile(peer.path / "rounds.jsonl")) for peer in peers]
    while True:
        for peer, file in files:
            for record in file.news():
                yield peer, record
        if wait is None:
            return
        wait()


class Export:
    """Takes the records of peers to their sinks."""

    def __init__(self, sinks: Mapping[PeerFolder, RecordSink]) -> None:
        self._sinks = sinks
        self.written = 0
        """Rounds that were not there before."""

    def run(self, wait: Callable[[], object] | None = None) -> None:
        """Write what there is; with `wait`, as in `stream`, go on for good."""
        for peer, record in stream(list(self._sinks), wait):
            self.written += self._sinks[peer].write(record)

    def close(self) -> None:
        """Finish all sinks."""
        for sink in self._sinks.values():
            sink.close()


def label(peer: PeerFolder) -> str:
    """What a peer is called among others: its run's name with the beginning of its id, and its own."""
    return f"{run_name(peer.run) or 'run'}-{peer.run.run_id[:8]}/{peer.name}"


def wandb_sink(peer: PeerFolder, project: str) -> WandbSink:
    """A sink for one peer, with what its run's manifest says. Raises P2PLLMError."""
    loaded = peer.run.load()
    config: dict[str, Any] = {} if loaded is None else loaded[0].model_dump(mode="json")
    group = peer.run.run_id[:16]
    # Many machines of a run have a peer of the same name.
    who = Identity.load_or_create(peer.key).peer_id[-16:] if peer.key.exists() else peer.name
    return WandbSink(project, group, f"{group}-{who}", label(peer), config, peer.path)


class Readings:
    """What all peers of this machine show, whenever it is called: those that come later, too. Safe for threads."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._followed: dict[PeerFolder, _Followed] = {}
        self._lock = threading.Lock()

    def __call__(self) -> list[Reading]:
        """Read what is new and ask all daemons; takes a little longer than ANSWER_S at most."""
        with self._lock:
            peers = [peer for run in all_runs(self._home) for peer in run.peers()]
            self._followed = {peer: self._followed.get(peer) or _Followed(peer) for peer in peers}
            with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
                statuses = list(pool.map(_status, peers))
            return [
                Reading(peer.run.run_id[:16], peer.name, status, self._followed[peer].tally())
                for peer, status in zip(peers, statuses, strict=True)
            ]


class _Followed:
    """One peer's records, summed up."""

    def __init__(self, peer: PeerFolder) -> None:
        self._tally = Tally()
        self._file = RecordFile(peer.path / "rounds.jsonl", self._anew)

    def tally(self) -> Tally:
        """With all that is there now; what cannot be read just now comes the next time."""
        try:
            for record in self._file.news():
                self._tally.add(record)
        except OSError:
            pass
        return self._tally

    def _anew(self) -> None:
        self._tally = Tally()


def _status(peer: PeerFolder) -> Status | None:
    """What a peer's daemon says; None if there is none that answers."""
    running = peer.running()
    if not running:
        return None
    try:
        status = ask(running["socket"], {"do": "status"}, ANSWER_S)
    except (DaemonError, KeyError):
        return None  # it is just ending, or frozen
    return None if "error" in status else status


class MetricsServer:
    """Answers Prometheus over HTTP, in threads of its own, until it is closed."""

    def __init__(self, home: Path, host: str, port: int) -> None:
        """port: 0 takes any free one. Raises UsageError if nobody can listen there."""
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(PrometheusCollector(Readings(home)))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UsageError(
                f"Nothing can listen on {host} port {port} ({error.strerror or error}); choose others with --host and "
                f"--port."
            ) from None
        self.port = self._server.server_port
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}/metrics"

    def wait(self) -> None:
        """Until the program is interrupted."""
        self._thread.join()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
