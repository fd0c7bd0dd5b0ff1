"""What carries the packets of a lab: the user-space box, where every kernel will do.

`Wires` is what `links` needs of it; `BoxWires` is the box (`box`), its namespaces and its process; the other kind, of
the kernel's own veth, tbf and netem, is in `netem`. Peers are numbered here; names are for `links`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import IO, Any, Protocol

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.commands import run
from p2pllm_peers.lab.evidence import Emulator
from p2pllm_peers.lab.scenario import Link

ANSWER_TIMEOUT_S = 20.0
"""A box that does not answer for so long is stuck; the machine may be busy, so it is generous."""

HUB = "hub"
"""Suffix of the namespace in the middle."""

Pairs = set[tuple[int, int]]
"""(from, to): whose packets vanish."""


class Wires(Protocol):
    """A star of lines between the middle and namespaces that exist already."""

    kind: str

    def start(self) -> None:
        """Make all devices. Raises RunError."""

    def change(self, peer: int, link: Link | None) -> None:
        """Shape one line from now on; None: not at all."""

    def block(self, pairs: Pairs) -> None:
        """From now on exactly these packets vanish."""

    def counters(self) -> list[tuple[int, int]]:
        """Bytes from and to each peer so far."""

    def emulator(self) -> Emulator:
        """What it has cost so far."""

    def stop(self) -> None:
        """End what runs; the namespaces stay for their owner to remove."""


class BoxWires:
    """The box and its process in the hub's namespace."""

    kind = "tun box"

    def __init__(self, hub: str, namespaces: Sequence[str], addresses: Sequence[str], seed: int) -> None:
        """namespaces, addresses: of all peers, in the order of their numbers."""
        self._hub = hub
        self._namespaces = namespaces
        self._addresses = addresses
        self._seed = seed
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._number, self._unread = 0, b""
        self._last: dict[str, Any] = {"wire": [(0, 0) for _ in namespaces]}

    def start(self) -> None:
        """Start the box and give each peer its device."""
        self._process = subprocess.Popen(
            [*in_namespace(self._hub), sys.executable, "-m", "p2pllm_peers.lab.network.box"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._ask({"do": "open", "addresses": self._addresses, "seed": self._seed})
        ip(self._hub, (f"link set t{peer} netns {name} name eth0" for peer, name in enumerate(self._namespaces)))
        for name, address in zip(self._namespaces, self._addresses, strict=True):
            ip(name, peer_commands(address))

    def change(self, peer: int, link: Link | None) -> None:
        """Frames that are under way keep their times."""
        line = dict.fromkeys(("up_mbit", "down_mbit", "delay_ms", "jitter_ms", "loss", "nat"), 0)
        if link is not None:
            line = {name: getattr(link, name) for name in line}
        self._ask({"do": "line", "peer": peer, **line})

    def block(self, pairs: Pairs) -> None:
        """Packets that are under way still arrive."""
        self._ask({"do": "block", "pairs": sorted(pairs)})

    def counters(self) -> list[tuple[int, int]]:
        """As the box counted them: packet by packet, with Ethernet header."""
        self._last = self._ask({"do": "count"})
        return [(sent, received) for sent, received in self._last["wire"]]

    def emulator(self) -> Emulator:
        """As the box counted; its last words if it has ended."""
        with contextlib.suppress(RunError):
            self.counters()
        return Emulator(kind=self.kind, **{key: self._last[key] for key in Emulator.model_fields if key in self._last})

    def stop(self) -> None:
        """The box ends with its standard input, and the devices with it."""
        if self._process is None:
            return
        with self._lock:
            try:
                with contextlib.suppress(OSError):  # it is gone
                    self._process.communicate(timeout=ANSWER_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
            self._process = None

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and wait until it is carried out. Raises RunError if the box has ended."""
        with self._lock:
            if self._process is None:
                raise RunError("The lab's network has been stopped.")
            self._number += 1
            with contextlib.suppress(OSError):  # it has ended; the missing answer says so
                line = json.dumps({"number": self._number, **order}).encode() + b"\n"
                os.write(_fileno(self._process.stdin), line)
            answer = self._await(self._process, self._number)
            if answer is None:
                self._process.kill()
                errors = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
                self._process = None
                raise RunError(f"The lab's network box has failed: {errors[-1] if errors else 'it does not answer'}.")
        if "error" in answer:
            raise RunError(f"The lab's network box cannot {order['do']} its lines: {answer['error']}.")
        return answer

    def _await(self, process: subprocess.Popen[bytes], number: int) -> dict[str, Any] | None:
        """The answer to the order of that number; one that Ctrl+C left unread is passed over. None if none comes."""
        handle = _fileno(process.stdout)
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                answer: dict[str, Any] = json.loads(line)
                if answer["number"] == number:
                    return answer
            if not select.select([handle], [], [], ANSWER_TIMEOUT_S)[0] or not (data := os.read(handle, 1 << 16)):
                return None
            self._unread += data


def _fileno(pipe: IO[bytes] | None) -> int:
    assert pipe is not None  # noqa: S101 - it was asked for
    return pipe.fileno()


def in_namespace(name: str) -> list[str]:
    """Words before a command line that run it in a namespace; same process, same standard streams.

    `ip netns exec` would hide the cgroups, and with them what a peer may take of the processors.
    """
    return ["nsenter", f"--net=/var/run/netns/{name}"]


def peer_commands(address: str) -> list[str]:
    """Commands of `ip` that bring up eth0 and lo in a peer's namespace, without IPv6 talking by itself."""
    return [
        "link set lo up",
        "link set eth0 addrgenmode none",
        f"address add {address}/16 dev eth0",
        "link set eth0 up",
    ]


def ip(namespace: str, commands: Iterable[str]) -> None:
    """Commands of `ip` in one namespace, up to the first that fails. Raises RunError with what it says."""
    batch("ip", namespace, commands)


def batch(program: str, namespace: str, commands: Iterable[str]) -> None:
    """Commands of one of iproute2's programs in one namespace. Raises RunError."""
    arguments = [program, *(["-n", namespace] if namespace else []), "-batch", "-"]
    result = run(arguments, "\n".join(commands))
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise RunError(f"The lab cannot set up its network: `{program}` says: {lines[0] if lines else 'nothing'}.")
