"""Machines: for every peer of a scenario an address, a share of a core and a disk, as if it were a computer.

What runs on a machine is started with its `prefix`; the rest of the lab sees machines only. What lives here: making
and ending them together. What does not: how links (`links`), budgets (`budgets`) and undoing (`claims`) work.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from p2pllm.errors import RunError, UsageError
from p2pllm_peers.lab import budgets
from p2pllm_peers.lab.budgets import Budgets
from p2pllm_peers.lab.cleanup.claims import Claims
from p2pllm_peers.lab.cleanup.commands import run
from p2pllm_peers.lab.evidence import PEERS, Emulator, LinkCheck
from p2pllm_peers.lab.network import links
from p2pllm_peers.lab.network.links import Links
from p2pllm_peers.lab.scenario import PeerSpec, Scenario

GRACE_S = 2.0
"""For processes that are on their way out when their daemon has ended."""

FILLER = "filler"
"""File that fills a disk."""

_NEED_LINKS = frozenset({"cut", "mend", "partition", "heal", "slow_link", "restore_link"})


@dataclass(frozen=True)
class Machine:
    """Where one peer lives. `home` is its disk, `sockets` where its daemons keep theirs."""

    spec: PeerSpec
    home: Path
    sockets: Path
    host: str  # IP address to listen on
    prefix: tuple[str, ...]  # before every command that runs on it

    @property
    def name(self) -> str:
        """Name of the peer."""
        return self.spec.name


class Machines:
    """Use as a context: on leaving nothing of them is left, but for the files of the peers' disks."""

    def __init__(self, scenario: Scenario, out: Path) -> None:
        """out: the folder in which the disks shall be. Raises UsageError if the scenario needs what is not here."""
        self.notes: list[str] = []
        self.left_over: list[str] = []
        self.links: Links | None = None
        self._budgets: Budgets | None = None
        self.specs = {spec.name: spec for spec in scenario.peer_specs()}
        self._out = out
        self._seed = scenario.seed
        self._shaped = all(spec.link is not None for spec in self.specs.values())
        self.budgeted = any(spec.cores for spec in self.specs.values())
        self._check(scenario)
        self._machines: dict[str, Machine] = {}
        self._disks: dict[str, Path] = {}

    def _check(self, scenario: Scenario) -> None:
        """Go without shaping where this machine cannot shape, but not where the scenario then makes no sense."""
        kinds = {event.do for event in scenario.events}
        if scenario.churn.faults_per_hour and "cut" in scenario.churn.kinds:
            kinds.add("cut")
        nat = any(spec.link is not None and spec.link.nat for spec in self.specs.values())
        if self._shaped and (reason := links.why_not()):
            if needs := sorted(kinds & _NEED_LINKS) + ["nat"] * nat:
                raise UsageError(f"The scenario {scenario.name} has {needs[0]}, for which {reason}.")
            self._shaped = False
            self.notes.append(f"All peers are on loopback with no shaping: {reason}.")
        if not self._shaped and kinds & _NEED_LINKS:
            raise UsageError(f"The scenario {scenario.name} has {sorted(kinds & _NEED_LINKS)[0]}, but no links.")
        if self.budgeted and (reason := budgets.why_not()):
            self.budgeted = False
            self.notes.append(f"No peer has a CPU budget, so one that waits speeds up the others: {reason}.")
        if any(spec.disk_mb for spec in self.specs.values()) and os.geteuid() != 0:
            raise UsageError(
                f"The scenario {scenario.name} gives peers disks of their own (disk_mb), which needs root."
            )

    def __enter__(self) -> Machines:
        self._claims = Claims.open()
        self._runtime = Path(tempfile.gettempdir()) / self._claims.name()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, peer: str) -> Machine:
        return self._machines[peer]

    def _start(self) -> None:
        names = list(self.specs)
        self._claims.note("folder", str(self._runtime))
        for name in names:
            (self._runtime / name).mkdir(parents=True, mode=0o700)
        lines = {name: spec.link for name, spec in self.specs.items() if spec.link}
        if self._shaped:
            self.links = Links(self._claims, lines, self._seed)
            self.links.start()
        if self.budgeted:
            self._budgets = Budgets(self._claims)
            self._budgets.start(names)
        for name, spec in self.specs.items():
            prefix, host = self._local_prefix(name), "127.0.0.1"
            if self.links is not None:
                prefix, host = (*prefix, *self.links.prefix(name)), self.links.address(name)
            self._machines[name] = Machine(spec, self._out / PEERS / name, self._runtime / name, host, prefix)
            if spec.disk_mb:
                self._mount(name, spec.disk_mb)

    def close(self) -> None:
        """End and remove everything; what could not be is in `left_over`."""
        try:
            for name in list(self._disks):
                self._unmount(name)
            if self.links is not None:
                self.links.stop()
        finally:
            failed = self._claims.release()
            self.left_over = failed or self._claims.left_over()

    def offline(self, peer: str) -> Machine:
        """The same machine with another disk and no network but its own loopback's."""
        home, prefix = self._out / "alone" / peer, self._local_prefix(peer)
        return Machine(self.specs[peer], home, self._runtime / peer, "127.0.0.1", prefix)

    def _local_prefix(self, peer: str) -> tuple[str, ...]:
        """Own sockets, own share of a core."""
        sockets = ("env", f"XDG_RUNTIME_DIR={self._runtime / peer}")
        return (*sockets, *(self._budgets.prefix(peer) if self._budgets is not None else ()))

    @property
    def has_nat(self) -> bool:
        """Somebody cannot be reached, so that the others shall relay."""
        return self.links is not None and any(spec.link is not None and spec.link.nat for spec in self.specs.values())

    # -- while it runs -----------------------------------------------------------------------------------------

    def check_links(self) -> list[LinkCheck]:
        """Measure every line with real traffic; takes seconds, and the lines must be idle."""
        return self.links.check() if self.links is not None else []

    def emulator(self) -> Emulator:
        """What makes the links, and what it has cost so far."""
        return self.links.emulator() if self.links is not None else Emulator(kind="none")

    def counters(self) -> dict[str, tuple[int, int]]:
        """Bytes on the wire so far, up and down, by peer; empty on loopback, where nothing tells peers apart."""
        return self.links.counters() if self.links is not None else {}

    def cpu_s(self, peer: str) -> float | None:
        """CPU seconds of all processes of a peer so far; None without budgets."""
        return self._budgets.cpu_s(peer) if self._budgets is not None else None

    def limit(self, peer: str, cores: float) -> None:
        """Give a peer this share of a core from now on; 0 lifts the limit."""
        if self._budgets is not None:
            self._budgets.limit(peer, cores)

    def pids(self, peer: str, daemon: int) -> list[int]:
        """All processes of a peer whose daemon has the process id `daemon`."""
        import psutil

        if self._budgets is not None:
            return self._budgets.pids(peer)
        try:
            process = psutil.Process(daemon)
            return [daemon, *(child.pid for child in process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def still_there(self, left: Iterable[str]) -> list[str]:
        """Processes of any peer, and sockets of those in `left`, which left in order; after a moment's grace."""
        end = time.monotonic() + GRACE_S
        while found := [*self._processes(), *(str(s) for peer in left for s in (self._runtime / peer).iterdir())]:
            if time.monotonic() > end:
                return found
            time.sleep(0.05)
        return []

    def _processes(self) -> list[str]:
        import psutil

        found = []
        for pid in (pid for name in self.specs for pid in (self._budgets.pids(name) if self._budgets else ())):
            with contextlib.suppress(psutil.Error):
                found.append(f"process {pid}: {' '.join(psutil.Process(pid).cmdline())[:100]}")
        return found

    # -- disks -------------------------------------------------------------------------------------------------

    def _mount(self, peer: str, megabytes: int) -> None:
        """A disk that can be full without the machine's being full."""
        home = self._machines[peer].home
        home.mkdir(parents=True)
        source = self._claims.note("mount", self._claims.name(f"disk-{peer}"))
        _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", source, str(home))
        self._disks[peer] = home

    def _unmount(self, peer: str) -> None:
        """Keep the files of a disk that lies in memory."""
        home = self._disks.pop(peer)
        (home / FILLER).unlink(missing_ok=True)
        kept = home.with_name(f".{peer}-kept")
        shutil.copytree(home, kept, ignore=shutil.ignore_patterns("*.sock"))
        _run("umount", str(home))
        home.rmdir()
        kept.rename(home)


def _run(*command: str) -> None:
    done = run(command)
    if done.returncode:
        raise RunError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}.")
