"""What carries the packets of a lab where the kernel can do it all: veth pairs, a bridge, tbf for rates, netem.

One qdisc chain at each end of a pair: netem delays and loses, then tbf limits the rate. Packets are never larger than
the wire's here (`gso_max_segs 1`): netem would lose a super-segment whole. A cut is a neighbour entry that names a
hardware address which nobody has: the bridge drops the packet, and no sender is told.

It cannot make NAT. What does not live here: the box for other kernels (`wires`).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.commands import run
from p2pllm_peers.lab.evidence import Emulator
from p2pllm_peers.lab.network.lines import QUEUE_S
from p2pllm_peers.lab.network.wires import Pairs, batch, in_namespace, ip, peer_commands
from p2pllm_peers.lab.scenario import Link

_NOBODY = "02:00:00:00:00:00"
_BURST_BYTES = 8 * 1514
"""What may pass at once after a pause; fast lines get more, because the kernel does not wake up often enough."""


class KernelWires:
    """A bridge in the hub's namespace, and a veth pair to each peer's eth0."""

    def __init__(self, hub: str, namespaces: Sequence[str], addresses: Sequence[str]) -> None:
        """namespaces, addresses: of all peers, in the order of their numbers."""
        self.kind = "netem"
        self._hub = hub
        self._namespaces = namespaces
        self._addresses = addresses
        self._blocked: Pairs = set()
        self._holder: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._last = Emulator(kind=self.kind)

    def start(self) -> None:
        """Make bridge, pairs and neighbour entries."""
        ip(self._hub, hub_commands(self._namespaces))
        peers = range(len(self._namespaces))
        batch("bridge", self._hub, (f"fdb add {mac(peer)} dev v{peer} master static" for peer in peers))
        for peer, (name, address) in enumerate(zip(self._namespaces, self._addresses, strict=True)):
            ip(name, [f"link set eth0 address {mac(peer)} gso_max_segs 1", *peer_commands(address)])
            ip(name, self._neighbours(peer, (other for other in range(len(self._namespaces)) if other != peer)))
        # its only use is that /proc/<pid>/net/dev shows the hub's counters without a program started each time
        self._holder = subprocess.Popen(
            [*in_namespace(self._hub), "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._holder.stdout is not None  # noqa: S101 - it was asked for
        self._holder.stdout.readline()  # it is in the namespace

    def change(self, peer: int, link: Link | None) -> None:
        """Replaces the qdiscs: what waits in them is lost, as when a modem connects anew."""
        if link is not None and link.nat:
            raise RunError("A line without NAT cannot get it while the lab runs; give it nat from the start.")
        for namespace, device in ((self._namespaces[peer], "eth0"), (self._hub, f"v{peer}")):
            run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"])  # there may be none
            if link is not None:
                mbit = link.up_mbit if device == "eth0" else link.down_mbit
                batch("tc", namespace, qdisc_commands(device, mbit, link))

    def block(self, pairs: Pairs) -> None:
        """Change the neighbour entries of those pairs alone that change."""
        changed, self._blocked = self._blocked ^ pairs, set(pairs)
        for peer in {source for source, _ in changed}:
            ip(self._namespaces[peer], self._neighbours(peer, (other for source, other in changed if source == peer)))

    def counters(self) -> list[tuple[int, int]]:
        """The counters of the hub's ends: what came out of a peer's line, and what went into it."""
        return [(got, sent) for got, _, sent, _ in self._devices()]

    def emulator(self) -> Emulator:
        """The kernel does not tell what its queues cost, nor how late they are."""
        if self._holder is not None:
            rows = self._devices()
            self._last = Emulator(
                kind=self.kind,
                wall_s=time.monotonic() - self._began,
                frames=sum(row[3] for row in rows),
                bytes=sum(row[2] for row in rows),
            )
        return self._last

    def stop(self) -> None:
        """Devices go with the namespaces."""
        if self._holder is not None:
            self._holder.communicate()
            self._holder = None

    def _neighbours(self, peer: int, others: Iterable[int]) -> list[str]:
        return [
            f"neighbour replace {self._addresses[other]} dev eth0 nud permanent "
            f"lladdr {_NOBODY if (peer, other) in self._blocked else mac(other)}"
            for other in others
        ]

    def _devices(self) -> list[tuple[int, int, int, int]]:
        """(bytes in, packets in, bytes out, packets out) of the hub's end of each pair, in the order of the peers."""
        if self._holder is None:
            raise RunError("The lab's network has been stopped.")
        return device_counters(Path(f"/proc/{self._holder.pid}/net/dev").read_text(), len(self._namespaces))


def hub_commands(namespaces: Sequence[str]) -> list[str]:
    """Commands of `ip` in the hub's namespace that make the star."""
    commands = ["link add br0 type bridge mcast_snooping 0", "link set br0 addrgenmode none", "link set br0 up"]
    for peer, name in enumerate(namespaces):
        commands += [
            f"link add v{peer} type veth peer name eth0 netns {name}",
            f"link set v{peer} addrgenmode none gso_max_segs 1",
            f"link set v{peer} master br0 up",
            f"link set v{peer} type bridge_slave flood off learning off",
        ]
    return commands


def qdisc_commands(device: str, mbit: float, link: Link) -> list[str]:
    """Commands of `tc` that shape what leaves through a device as `link` says, at this rate."""
    tbf = f"tbf rate {mbit * 1e6:.0f}bit burst {max(_BURST_BYTES, round(mbit * 1e6 / 8 / 250))} latency {QUEUE_S:g}s"
    if not (link.delay_ms or link.jitter_ms or link.loss):
        return [f"qdisc add dev {device} root handle 1: {tbf}"]
    assert isinstance(link.delay_ms, float)  # noqa: S101 - drawn before it comes here
    # netem's jitter goes both ways from the middle; a rate far above the line's keeps it from overtaking
    middle, spread = link.delay_ms + link.jitter_ms / 2, link.jitter_ms / 2
    words = [f"netem delay {middle:.3f}ms {spread:.3f}ms"]
    if spread:
        words.append("rate 100gbit")
    if link.loss:
        words.append(f"loss {link.loss * 100:.4f}%")
    held = mbit * 1e6 / 8 * (link.delay_ms + link.jitter_ms) / 1e3 / 64  # packets of 64 bytes, for acknowledgements
    words.append(f"limit {1000 + round(held)}")
    return [
        f"qdisc add dev {device} root handle 1: {' '.join(words)}",
        f"qdisc add dev {device} parent 1:1 handle 2: {tbf}",
    ]


def device_counters(text: str, count: int) -> list[tuple[int, int, int, int]]:
    """From a /proc/net/dev: (bytes in, packets in, bytes out, packets out) of v0, v1, ..."""
    rows = {line.split(":")[0].strip(): line.split(":")[1].split() for line in text.splitlines() if ":" in line}
    return [tuple(int(rows[f"v{peer}"][column]) for column in (0, 1, 8, 9)) for peer in range(count)]  # type: ignore[misc]


def mac(peer: int) -> str:
    """The hardware address of a peer's eth0."""
    return f"02:00:00:00:{(peer + 1) >> 8:02x}:{(peer + 1) & 255:02x}"


@cache
def has_netem() -> bool:
    """The kernel has netem and this machine `tc`: tried on the loopback device of a namespace that nobody else sees."""
    try:
        words = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        return run(words).returncode == 0
    except FileNotFoundError:
        return False
