"""A swarm of real daemons, one a machine: started, killed, frozen, started again, and gone at the end.

What lives here: the peers' processes and what they say of themselves. What does not: the machines (`machines`), what
befalls them when (`faults`), and showing it (`p2pllm_cli`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from p2pllm.errors import P2PLLMError, RunError
from p2pllm.manifest import RunDraft
from p2pllm.metrics import record_files
from p2pllm.settings import PeerSettings
from p2pllm.settings_file import with_changes
from p2pllm_peers.control import ask, watch
from p2pllm_peers.folders import PeerFolder, RunFolder
from p2pllm_peers.lab.evidence import read_lines
from p2pllm_peers.lab.machines import Machine, Machines
from p2pllm_peers.lab.scenario import Peers, Scenario
from p2pllm_peers.launcher import DaemonProcess, Order

LEAVE_TIMEOUT_S = 10.0
"""What a daemon promises for leaving in order."""

Progress = Callable[[str], None]


class SwarmPeer:
    """One peer through all its lives. `last` is what it said of itself last, `at` when, on the monotonic clock."""

    def __init__(self, machine: Machine, settings: PeerSettings, pids: Callable[[int], list[int]]) -> None:
        """pids: all processes of the peer, given its daemon's."""
        self.machine = machine
        self.name = machine.name
        self.ready: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.at = 0.0
        self.ready_unix: list[float] = []
        self.ended_unix: list[float] = []
        self.peer_ids: list[str] = []
        self.crashes: list[str] = []
        self.frozen = False
        self.left_in_order = True  # as far as its newest life has ended
        changes: dict[str, Any] = {"home": machine.home, "listen_host": machine.host}
        if machine.spec.micro_batch:
            changes["micro_batch"] = machine.spec.micro_batch
        self._settings = with_changes(settings, machine.spec.settings).model_copy(update=changes)
        self._pids = pids
        self._process: DaemonProcess | None = None
        self._expected_end = True
        self._facts: dict[str, Any] = {}  # of the newest life on this disk

    @property
    def process(self) -> DaemonProcess:
        """The daemon of its newest life."""
        assert self._process is not None  # noqa: S101 - it was started
        return self._process

    @property
    def is_running(self) -> bool:
        """Its daemon is there: starting, ready or frozen."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_up(self) -> bool:
        """Its daemon is there and takes part, frozen or not."""
        return bool(self.ready) and self.is_running

    @property
    def folder(self) -> PeerFolder | None:
        """Its folder on its disk; None before it was ready for the first time, and after it lost its disk."""
        run_id, name = self._facts.get("run_id"), self._facts.get("name")
        return RunFolder(self.machine.home, run_id).peer(name) if run_id and name else None

    def start(self, progress: Progress, *, draft: RunDraft | None = None, invite: str = "") -> None:
        """Found the run, join it, or (with neither) go on with it as `p2pllm join` alone does; returns when ready."""
        facts = self._facts
        order = Order(self._settings, draft=draft.model_dump(mode="json") if draft else None, invite=invite)
        if not draft and not invite:
            order = Order(self._settings, run_id=facts["run_id"], name=facts["name"])
        self.ready, self.last, self.frozen = {}, {}, False
        self._expected_end, self.left_in_order = False, True
        process = self._process = DaemonProcess(order, self.machine.prefix)
        try:
            ready = process.wait_ready(lambda text: progress(f"{self.name}: {text}"))
        except P2PLLMError as error:
            self.ended_unix.append(time.time())
            if not self._expected_end:  # else it was killed while it started
                raise RunError(f"{self.name} could not start: {error}") from None
            return
        self._facts = self.ready = ready
        self.ready_unix.append(time.time())
        if ready["peer_id"] not in self.peer_ids:
            self.peer_ids.append(ready["peer_id"])
        self._listener = threading.Thread(target=self._listen, args=(process, ready["socket"]), daemon=True)
        self._listener.start()

    def _listen(self, process: DaemonProcess, socket: str) -> None:
        """Keep `last` new while the daemon lives; notice its end."""
        while process.poll() is None:
            for status in watch(socket):
                self.last, self.at = status, time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a frozen daemon does not answer
                process.wait(0.5)
        self.ended_unix.append(time.time())
        if not self._expected_end:
            try:
                process.wait_end()
            except P2PLLMError as error:
                self.crashes.append(str(error))

    def status(self) -> dict[str, Any]:
        """What it says of itself now. Raises DaemonError if it does not answer."""
        return ask(self.ready["socket"], {"do": "status"})

    def records(self) -> list[dict[str, Any]]:
        """The rounds that it committed, as it recorded them on this disk."""
        files = record_files(self.folder.path / "rounds.jsonl") if self.folder is not None else []
        return [row for file in reversed(files) for row in read_lines(file)]

    def kill(self) -> None:
        """All its processes die at once, as when the power fails."""
        self.left_in_order &= not self.is_running
        self._expected_end = True
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Stop all its processes where they are, as when a laptop sleeps."""
        self.frozen = True
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self.frozen = False
        self._signal(signal.SIGCONT)

    def pause(self) -> None:
        """Its user wants a rest."""
        ask(self.ready["socket"], {"do": "pause", "seconds": None})

    def resume(self) -> None:
        """It may compute again."""
        ask(self.ready["socket"], {"do": "resume"})

    def leave(self) -> None:
        """Ask it to leave in order; it does so by itself if the lab dies."""
        self._expected_end = True
        if self.frozen:
            self.thaw()
        if self._process is not None:
            self._process.leave()

    def wait_end(self) -> None:
        """Wait until the run is over for it. Raises RunError if it ended with an error."""
        self._listener.join()
        if self.crashes:
            raise RunError(f"{self.name}: {self.crashes[-1]}")

    def wait_gone(self, timeout: float) -> bool:
        """Wait for its end, and end it if it does not come; whether it came by itself."""
        if self._process is None:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
            return True
        self.kill()
        return False

    def keep(self, out: Path) -> None:
        """Append what it recorded and logged on this disk to out/records/NAME.jsonl and out/logs/NAME.log."""
        if self.folder is None:
            return
        records = [(file, f"records/{self.name}.jsonl") for file in record_files(self.folder.path / "rounds.jsonl")]
        for source, target in (*reversed(records), (self.folder.path / "daemon.log", f"logs/{self.name}.log")):
            with contextlib.suppress(FileNotFoundError):
                content = source.read_bytes()
                (out / target).parent.mkdir(exist_ok=True)
                with (out / target).open("ab") as file:
                    file.write(content if content.endswith(b"\n") else content + b"\n")  # a torn line stays alone

    def wipe(self) -> None:
        """Lose the disk: files, identity, what a killed daemon left, and all."""
        self._facts = {}
        for folder in (self.machine.home, self.machine.sockets):
            for entry in folder.iterdir() if folder.is_dir() else ():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _signal(self, number: int) -> None:
        """Send a signal to every process of a living peer, those included that appear meanwhile."""
        sent: set[int] = set()
        if self._process is None or self._process.poll() is not None:
            return
        while new := set(self._pids(self._process.pid)) - sent:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            sent |= new


class Swarm:
    """Use as a context: on leaving it every process that it started has ended."""

    def __init__(self, machines: Machines, draft: RunDraft, settings: PeerSettings) -> None:
        """settings: of all peers, but for what belongs to their machines."""
        settings = settings.model_copy(update={"nat": machines.has_nat, "listen_port": 0, "threads": 1})
        self.peers = {
            name: SwarmPeer(machines[name], settings, partial(machines.pids, name)) for name in machines.specs
        }
        self._draft = draft
        self._founded = ""

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, names: list[str], progress: Progress) -> None:
        """Start a founder, then the others with its invite, and wait until all take part. Raises P2PLLMError."""
        founder = self.peers[names[0]]
        founder.start(progress, draft=self._draft)
        self._founded = founder.ready["invite"]
        progress(f"{founder.name}: takes part")
        start_together([self.peers[name] for name in names[1:]], lambda peer: self.join(peer.name, progress))

    def join(self, name: str, progress: Progress) -> None:
        """Start a peer with an invite, and wait until it takes part."""
        self.peers[name].start(progress, invite=self.invite())
        progress(f"{name}: takes part")

    def invite(self) -> str:
        """An invite as any living peer gives it; the founder's if nobody lives."""
        for peer in self.peers.values():
            if peer.is_up and not peer.frozen and peer.last.get("invite"):
                return str(peer.last["invite"])
        return self._founded

    def stop(self) -> list[str]:
        """Ask every daemon to leave at once, wait, and end those that do not; returns their names."""
        for peer in self.peers.values():
            peer.leave()
        end = time.monotonic() + LEAVE_TIMEOUT_S
        stuck = []
        try:
            for peer in self.peers.values():
                if not peer.wait_gone(max(0.1, end - time.monotonic())):
                    stuck.append(peer.name)
        finally:  # a second Ctrl+C, too, leaves nothing behind
            for peer in self.peers.values():
                peer.kill()
        return stuck


def start_together(peers: list[SwarmPeer], start: Callable[[SwarmPeer], None]) -> None:
    """Start peers at the same time and wait for all. If one fails, or we are interrupted, none goes on starting."""
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        try:
            for _ in pool.map(start, peers):
                pass
        except BaseException:
            for peer in peers:
                if not peer.ready:
                    peer.kill()
            raise


def plain_scenario(draft: RunDraft, count: int) -> Scenario:
    """Peers on loopback, without links, budgets and faults, all of them from the first round to the last."""
    together = draft.round.model_copy(update={"min_peers": count})  # else the first is done before the last has started
    run = draft.model_copy(update={"round": together})
    return Scenario(name="swarm", run=run, peers=(Peers(count=count, micro_batch=0),))


@contextlib.contextmanager
def swarm_on_loopback(draft: RunDraft, count: int, out: Path, settings: PeerSettings) -> Iterator[Swarm]:
    """`count` peers on loopback, none of them started yet, for tests and benchmarks that strike by themselves."""
    with Machines(plain_scenario(draft, count), out) as machines, Swarm(machines, draft, settings) as swarm:
        yield swarm
