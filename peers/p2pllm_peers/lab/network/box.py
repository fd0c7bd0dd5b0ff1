"""The box in the middle of the lab's network, for kernels without netem and for NAT: one process, tun devices.

    python -m p2pllm_peers.lab.network.box        told what to do by JSON lines on standard input, answers each with one

Each peer's eth0 is a tun device whose other end is here: the box reads what a peer sends, holds it as long as its
lines say (`lines`), and writes it to another peer's device. No bridge, no ARP, no second queue: every delay and every
drop of the network is in this one place, where it is counted. The box ends when its standard input does, and the
devices go with it. How much it holds: `scripts/bench/box.py`. What does not live here: namespaces and addresses
(`wires`).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import socket
import struct
import sys
import time
from typing import Any

from p2pllm_peers.lab.network.frames import IP_AT, LARGEST_FRAME
from p2pllm_peers.lab.network.lines import Lines

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02

_READS_AT_ONCE = 32
"""Frames read from one device before others get their turn."""

_PAUSE_S = 300e-6
"""Rest after each turn, as a network card rests between interrupts: under load the next turn then serves several
frames. It costs a lone frame nothing, and saves two fifths of the box's processor time at 400 Mbit/s in 27,000 frames a
second."""

_BUSY_FRAMES, _BUSY_PAUSE_S = 8, 500e-6
"""A turn that handed over so many frames is followed by a longer rest, which saves a tenth of the remainder."""

_PR_SET_TIMERSLACK = 29


def open_device(name: str) -> int:
    """Make a tun device in this network namespace; it goes with the returned descriptor. Raises OSError."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    except OSError:
        os.close(device)
        raise
    return device


class Box:
    """Devices, lines, and the loop between them."""

    def __init__(self) -> None:
        self._devices: list[int] = []
        self._lines = Lines([], self._write)
        self._unwritten = 0
        self._began = time.monotonic()

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; returns the answer. Raises OSError."""
        do = order.pop("do")
        if do == "open":
            addresses = [socket.inet_aton(address) for address in order["addresses"]]
            self._lines = Lines(addresses, self._write, order["seed"])
            self._devices = [open_device(f"t{index}") for index in range(len(addresses))]
        elif do == "line":
            self._lines.change(**order)
        elif do == "block":
            self._lines.block({(source, target) for source, target in order["pairs"]})
        elif do == "count":
            return self._counts()
        return {}

    def run(self) -> None:
        """Until standard input ends."""
        control = sys.stdin.fileno()
        os.set_blocking(control, False)
        index_of: dict[int, int] = {}
        watched = [control]
        pending = b""
        while True:
            before = self._lines.frames
            ready, _, _ = select.select(watched, (), (), self._lines.deliver())
            busy = self._lines.frames - before >= _BUSY_FRAMES
            for handle in ready:
                if handle != control:
                    self._read(handle, index_of[handle])
                    continue
                if not (data := os.read(control, 1 << 20)):
                    return
                *orders, pending = (pending + data).split(b"\n")
                for order in orders:
                    _answer(self, json.loads(order))
                index_of = {device: index for index, device in enumerate(self._devices)}
                watched = [control, *self._devices]
            time.sleep(_BUSY_PAUSE_S if busy else _PAUSE_S)

    def _read(self, device: int, source: int) -> None:
        take = self._lines.take
        try:
            for _ in range(_READS_AT_ONCE):
                frame = os.read(device, LARGEST_FRAME)
                if frame[IP_AT] >> 4 == 4:  # IPv6 is not spoken here
                    take(source, frame)
        except BlockingIOError:
            pass  # it was the last one

    def _write(self, target: int, frame: bytes) -> None:
        try:
            os.write(self._devices[target], frame)
        except OSError:  # the device is down, or there is no memory
            self._unwritten += 1

    def _counts(self) -> dict[str, Any]:
        lines = self._lines
        return {
            "cpu_s": time.process_time(),
            "wall_s": time.monotonic() - self._began,
            "frames": lines.frames,
            "bytes": sum(line.received for line in lines.lines),
            "dropped": lines.dropped,
            "unwritten": self._unwritten,
            "late_p99_ms": lines.late_p99_ms(),
            "late_max_ms": lines.late_max_ms,
            "wire": [(line.sent, line.received) for line in lines.lines],
        }


def _answer(box: Box, order: dict[str, Any]) -> None:
    """Carry out one order and say so."""
    number = order.pop("number")
    try:
        answer = box.obey(order)
    except OSError as error:
        answer = {"error": error.strerror or str(error)}
    sys.stdout.write(json.dumps({"number": number, **answer}) + "\n")
    sys.stdout.flush()


def _be_prompt() -> None:
    """Wires do not wait for a processor: run before everything else, wake to the microsecond, never collect garbage."""
    gc.disable()  # no cycles are made here
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def main() -> None:
    """Entry point."""
    _be_prompt()
    Box().run()


if __name__ == "__main__":
    main()
