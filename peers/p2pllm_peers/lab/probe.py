"""The small programs that measure lines from inside namespaces. Told what to do on standard input, one word a line.

    python -m p2pllm_peers.lab.probe serve                   prints "ready", then serves until standard input ends
    python -m p2pllm_peers.lab.probe measure ADDRESS JSON    for each of "ping", "up", "down" prints one JSON line

The server stands in a namespace without shaping. What does not live here: who measures when, and what the figures
mean (`checking`).
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import statistics
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

PORT = 7
PIECE = bytes(1 << 16)
_SILENCE_S = 15.0
"""A stream that stands still for so long measures nothing any more."""


@dataclass(frozen=True)
class Plan:
    """How one line is measured."""

    pings: int  # datagrams sent
    ping_every_s: float
    wait_s: float  # for the last answers
    warm_s: float  # before a stream is counted
    count_s: float


def ping(address: str, plan: Plan) -> dict[str, float]:
    """Round trips of datagrams sent evenly: the median in ms, and the share that never came back."""
    trips: dict[int, float] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.connect((address, PORT))
        begin, sent, end = time.perf_counter(), 0, 0.0
        while (now := time.perf_counter()) < (end or now + 1) and len(trips) < plan.pings:
            due = begin + sent * plan.ping_every_s
            if sent < plan.pings and now >= due:
                line.send(struct.pack("!Id", sent, now))
                sent += 1
                end = now + plan.wait_s if sent == plan.pings else 0.0
                continue
            if select.select([line], [], [], (end if sent == plan.pings else due) - now)[0]:
                number, at = struct.unpack("!Id", line.recv(64))
                trips[number] = time.perf_counter() - at
    median = statistics.median(trips.values()) if trips else float("nan")
    return {"trip_ms": median * 1e3, "lost": 1 - len(trips) / plan.pings}


def pull(line: socket.socket, plan: Plan) -> float:
    """Bytes of payload a second that come in, over `count_s` once `warm_s` have passed."""
    line.settimeout(_SILENCE_S)
    buffer = bytearray(1 << 20)
    begin = time.perf_counter()
    since, total, last = 0.0, 0, 0.0
    while not since or last - since < plan.count_s:
        if not (got := line.recv_into(buffer)):
            break
        last = time.perf_counter()
        if since:
            total += got
        elif last - begin >= plan.warm_s:
            since = last
    return total / (last - since) if last > since > 0 else 0.0


def push(line: socket.socket) -> None:
    """Send until the other side has had enough."""
    with contextlib.suppress(AttributeError, OSError):  # other systems; a kernel without it
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")  # losses shall not hide the rate
    with contextlib.suppress(OSError):
        while True:
            line.sendall(PIECE)


def measure(address: str, plan: Plan) -> None:
    """Do what standard input says, one answer a line."""
    for word in sys.stdin:
        answer: Any
        if word.strip() == "ping":
            answer = ping(address, plan)
        else:
            with socket.create_connection((address, PORT), timeout=_SILENCE_S) as line:
                line.sendall(json.dumps({"do": word.strip(), **asdict(plan)}).encode() + b"\n")
                if word.strip() == "down":
                    answer = pull(line, plan)
                    _reset(line)
                else:
                    threading.Thread(target=push, args=(line,), daemon=True).start()
                    answer = json.loads(line.makefile("rb").readline() or b"0")
                    _reset(line)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def serve() -> None:
    """Answer datagrams and streams until standard input ends."""
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("", PORT))
    listener = socket.create_server(("", PORT), backlog=128)
    threading.Thread(target=_echo, args=(echo,), daemon=True).start()
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


def _echo(line: socket.socket) -> None:
    while True:
        data, sender = line.recvfrom(64)
        line.sendto(data, sender)


def _accept(listener: socket.socket) -> None:
    while True:
        line, _ = listener.accept()
        threading.Thread(target=_stream, args=(line,), daemon=True).start()


def _stream(line: socket.socket) -> None:
    with line, line.makefile("rb") as lines, contextlib.suppress(OSError):
        order = json.loads(lines.readline())
        if order.pop("do") == "down":
            push(line)
        else:
            rate = pull(line, Plan(**order))
            line.sendall(json.dumps(rate).encode() + b"\n")
            while line.recv(1 << 20):  # to close now could overtake the answer
                pass


def _reset(line: socket.socket) -> None:
    """What is still on its way is of no use: let the line be idle for the next measurement."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def main() -> None:
    """Entry point."""
    if sys.argv[1] == "serve":
        serve()
    else:
        measure(sys.argv[2], Plan(**json.loads(sys.argv[3])))


if __name__ == "__main__":
    main()
