"""A swarm of real daemons on loopback: started, watched, and gone again whatever happens.

Each peer has its own folder, identity and processes, exactly as on its own machine. What does not live here:
showing it (`p2pllm_cli`).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pllm.errors import DaemonError, RunError, UsageError
from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings
from p2pllm_peers.control import ask
from p2pllm_peers.folders import RunFolder
from p2pllm_peers.launcher import DaemonProcess, Order

LEAVE_TIMEOUT_S = 9.0
POLL_S = 0.5


@dataclass
class SwarmPeer:
    """One daemon of the swarm."""

    name: str
    home: Path
    process: DaemonProcess
    ready: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of this peer in its home."""
        return RunFolder(self.home, self.ready["run_id"]).peer(self.ready["name"]).path

    def status(self) -> dict[str, Any] | None:
        """The daemon's status; None when it has ended or is about to."""
        if self.process.poll() is not None:
            return None
        try:
            self.last = ask(self.ready["socket"], {"do": "status"}, timeout=5)
        except DaemonError:
            return None
        return self.last

    def records(self) -> list[dict[str, Any]]:
        """The rounds that this peer committed, as it recorded them."""
        return read_records(self.folder / "rounds.jsonl")


class Swarm:
    """Use as a context: on leaving it every process that it started has ended."""

    def __init__(self, draft: RunDraft, out: Path, settings: PeerSettings) -> None:
        """out: a new or empty folder for the peers' folders and the report."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"The folder {out} is not empty; name another one with --out.")
        self.peers: list[SwarmPeer] = []
        self._draft = draft
        self._out = out
        self._settings = settings
        self._launched = 0

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, count: int, progress: Callable[[str], None]) -> None:
        """Start a founder, then the others with its invite, and wait until all take part."""
        founder = self.add(progress)
        others = [self._launch(founder.ready["invite"]) for _ in range(1, count)]
        for peer in others:
            self._await(peer, progress)

    def add(self, progress: Callable[[str], None]) -> SwarmPeer:
        """Start one more peer (the first founds the run) and wait until it takes part."""
        peer = self._launch(self.peers[0].ready["invite"] if self.peers else "")
        self._await(peer, progress)
        return peer

    def restart(self, peer: SwarmPeer, progress: Callable[[str], None]) -> None:
        """Start a peer that has ended again, with its folder as it is and nothing but the invite."""
        peer.process = DaemonProcess(
            Order(self._settings_of(peer.home), invite=peer.ready["invite"], name=peer.ready["name"])
        )
        self._await(peer, progress)

    def watch(self) -> Iterator[list[dict[str, Any]]]:
        """The last status of every peer, about twice a second, until all have ended by themselves.

        Raises RunError if a daemon ends with an error.
        """
        while any(peer.process.poll() is None for peer in self.peers):
            for peer in self.peers:
                peer.status()
                if peer.process.poll() not in (None, 0):
                    raise RunError(f"{peer.name} ended with code {peer.process.poll()}; see {peer.folder}/daemon.log.")
            yield [peer.last for peer in self.peers if peer.last]
            time.sleep(POLL_S)  # the interval of the table

    def stop(self) -> None:
        """Ask every daemon to leave at once, wait, and end those that do not."""
        for peer in self.peers:
            peer.process.leave()
        end = time.monotonic() + LEAVE_TIMEOUT_S
        try:
            for peer in self.peers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    peer.process.wait(max(0.1, end - time.monotonic()))
        finally:  # a second Ctrl+C, too, leaves nothing behind
            for peer in self.peers:
                if peer.process.poll() is None:
                    peer.process.kill()

    def report(self) -> dict[str, Any]:
        """What the swarm did, from the peers' own records; also written to report.json."""
        from p2pllm_peers.lab.report import summarise

        report = summarise({peer.name: peer.records() for peer in self.peers if peer.ready})
        report["peers"] = {
            peer.name: {
                "peer_id": peer.ready["peer_id"],
                "bytes_sent": peer.last.get("bytes_sent"),
                "bytes_received": peer.last.get("bytes_received"),
                "log": str(peer.folder / "daemon.log"),
            }
            for peer in self.peers
            if peer.ready
        }
        (self._out / "report.json").write_text(json.dumps(report, indent=1))
        return report

    def _settings_of(self, home: Path) -> PeerSettings:
        return self._settings.model_copy(
            update={"home": home, "listen_host": "127.0.0.1", "nat": False, "listen_port": 0, "threads": 1}
        )

    def _launch(self, invite: str) -> SwarmPeer:
        home = self._out / f"peer-{self._launched}"
        self._launched += 1
        settings = self._settings_of(home)
        order = Order(settings, invite=invite) if invite else Order(settings, draft=self._draft.model_dump(mode="json"))
        peer = SwarmPeer(home.name, home, DaemonProcess(order))
        self.peers.append(peer)
        return peer

    def _await(self, peer: SwarmPeer, progress: Callable[[str], None]) -> None:
        peer.ready = peer.process.wait_ready(lambda text: progress(f"{peer.name}: {text}"))
        progress(f"{peer.name}: takes part")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a line that is being written is left out."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]
