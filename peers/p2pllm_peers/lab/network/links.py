"""A star of network namespaces, one a peer, with lines of given rate, delay, jitter, loss and NAT; cut and mended.

What lives here: peers by name, who reaches whom, and what the lines really do, measured. What does not: how packets
are carried (`wires`, `netem`), the programs that measure (`probe`), and running peers (`machines`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from p2pllm_peers.lab.cleanup.claims import Claims
from p2pllm_peers.lab.evidence import Emulator, LinkCheck
from p2pllm_peers.lab.network.checking import measure
from p2pllm_peers.lab.network.netem import KernelWires, has_netem
from p2pllm_peers.lab.network.wires import HUB, BoxWires, Pairs, Wires, in_namespace, ip
from p2pllm_peers.lab.scenario import Link

_PREFIX = "60.0"
"""libp2p treats private, shared and benchmark ranges as a sign of NAT: it neither announces nor dials them as it does
real ones. Inside namespaces without a way out every address is ours, so the peers get ordinary public ones."""

Kind = Literal["", "box", "kernel"]


def why_not() -> str:
    """What keeps this machine from making links, as a clause without full stop; "" if nothing does."""
    if not Path("/proc/self/ns/net").exists():
        return "links need network namespaces, which this system does not have"
    if os.geteuid() != 0:
        return "links need root"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if not shutil.which(program):
            return f"links need the program `{program}`, which the package {package} brings"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "links need the right to make network namespaces, which root does not have in this container"
    if not Path("/dev/net/tun").exists() and not has_netem():
        return "links need /dev/net/tun, which `modprobe tun` makes"
    return ""


class Links:
    """The lines of one lab. Any thread may call any method; each returns when what it says is in force."""

    def __init__(self, claims: Claims, links: Mapping[str, Link], seed: int = 0, kind: Kind = "") -> None:
        """Makes nothing yet.

        links: each peer's line, its delay one number. seed: of the box's losses and jitter. kind: what makes the
        lines; "" chooses netem where the kernel has it, unless somebody is behind NAT, which only the box can do.
        """
        self._claims = claims
        self._links = dict(links)
        self._names = list(links)
        self._index = {name: index for index, name in enumerate(links)}
        self._namespaces = [claims.name(f"peer-{name}") for name in links]
        self._probe = claims.name("probe")
        self._wires = self._choose(seed, kind)
        self._lock = threading.Lock()
        self._cut: set[str] = set()
        self._cut_pairs: set[frozenset[str]] = set()
        self._side: dict[str, int] = {}

    def start(self) -> None:
        """Make the namespaces and the lines between them. Raises RunError."""
        for name in (self._claims.name(HUB), *self._namespaces, self._probe):
            ip("", [f"netns add {self._claims.note('namespace', name)}"])
        self._wires.start()
        for name, link in self._links.items():
            self._wires.change(self._index[name], link)
        self._wires.change(len(self._names), None)

    def stop(self) -> None:
        """End what carries the packets. The namespaces, and all processes in them, go with the claims."""
        self._wires.stop()

    # -- peers -------------------------------------------------------------------------------------------------

    def address(self, peer: str) -> str:
        """The peer's IPv4 address, which all others reach it at."""
        return _address(self._index[peer])

    def prefix(self, peer: str) -> list[str]:
        """Words before a command line that run it on the peer's machine: same process, same standard streams."""
        return in_namespace(self._namespaces[self._index[peer]])

    # -- faults ------------------------------------------------------------------------------------------------

    def cut(self, peer: str, other: str | None = None) -> None:
        """Let the peer's packets vanish, both ways, or only those between it and `other`. Nobody is told."""
        with self._lock:
            if other:
                self._cut_pairs.add(frozenset((peer, other)))
            else:
                self._cut.add(peer)
            self._wires.block(self._blocked())

    def mend(self, peer: str, other: str | None = None) -> None:
        """Undo `cut` of the same arguments."""
        with self._lock:
            if other:
                self._cut_pairs.discard(frozenset((peer, other)))
            else:
                self._cut.discard(peer)
            self._wires.block(self._blocked())

    def partition(self, groups: Collection[Collection[str]]) -> None:
        """Only peers of one group reach each other; those in no group make one more together. Replaces the last."""
        with self._lock:
            self._side = {peer: number for number, group in enumerate(groups) for peer in group}
            self._wires.block(self._blocked())

    def heal(self) -> None:
        """Undo `partition`; cuts stay."""
        self.partition([])

    def change(self, peer: str, link: Link) -> None:
        """Give a peer another line. Raises RunError if the kernel makes the links and the new line has NAT."""
        with self._lock:
            self._wires.change(self._index[peer], link)
            self._links[peer] = link

    # -- figures -----------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, tuple[int, int]]:
        """Bytes on the wire so far, up and down, by peer: up before losses (with netem after them), down after them.

        Every packet counts with its Ethernet (14 bytes), IP and TCP or UDP headers, at an MTU of 1500; preamble and
        checksum of the Ethernet frame are not counted. Costs about a millisecond.
        """
        with self._lock:
            return dict(zip(self._names, self._wires.counters(), strict=False))

    def emulator(self) -> Emulator:
        """What makes the lines, what it has cost so far, and how late it was."""
        with self._lock:
            return self._wires.emulator()

    def check(self) -> list[LinkCheck]:
        """Measure all lines at once against a namespace without any shaping; takes some seconds.

        Rates are those of TCP streams, counted on the wire. Nothing else may run. Raises RunError.
        """
        peers = {name: self.prefix(name) for name in self._names}
        return measure(peers, in_namespace(self._probe), _address(len(peers)), self._links)

    # ----------------------------------------------------------------------------------------------------------

    def _choose(self, seed: int, kind: Kind) -> Wires:
        namespaces = [*self._namespaces, self._probe]
        addresses = [_address(index) for index in range(len(namespaces))]
        if not kind:
            kind = "kernel" if has_netem() and not any(link.nat for link in self._links.values()) else "box"
        if kind == "kernel":
            return KernelWires(self._claims.name(HUB), namespaces, addresses)
        return BoxWires(self._claims.name(HUB), namespaces, addresses, seed)

    def _blocked(self) -> Pairs:
        """All (from, to) whose packets vanish; the probe's number is the one after the last peer's."""
        everyone = [*self._names, ""]
        return {
            (i, j)
            for i, one in enumerate(everyone)
            for j, other in enumerate(everyone)
            if i != j
            and (
                {one, other} & self._cut
                or frozenset((one, other)) in self._cut_pairs
                or self._side.get(one, -1) != self._side.get(other, -1)
            )
        }


def _address(index: int) -> str:
    return f"{_PREFIX}.{index // 250}.{index % 250 + 1}"
