"""The small programs that measure lines from inside namespaces. Told what to do on standard input, one word a line.

    python -m p2pllm_peers.lab.network.probe serve                 prints "ready", serves until standard input ends
    python -m p2pllm_peers.lab.network.probe measure ADDRESS JSON  for each of "ping", "up", "down" prints one JSON line

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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

PORT = 7
_PIECE = bytes(1 << 16)
_SILENCE_S = 15.0
"""A stream that stands still for so long measures nothing any more."""

_TICK_S = 0.01
"""How exactly a window of counting is kept when nothing can be sent."""

_SND_MSS_AT, _SACKED_AT, _BYTES_ACKED_AT = 16, 28, 120
"""Places in Linux's struct tcp_info."""


@dataclass(frozen=True)
class Plan:
    """How one line is measured."""

    pings: int  # datagrams sent
    ping_every_s: float
    wait_s: float  # for the last answers
    warm_s: float  # before a stream is counted
    count_s: float
    streams: int  # at once on a line


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


def push(line: socket.socket, plan: Plan) -> float:
    """Send as fast as it goes; returns the bytes of payload a second that arrived, in whatever order.

    Counted from acknowledgements, over `count_s` once `warm_s` have passed: what waits behind a lost packet has crossed
    the line all the same.
    """
    with contextlib.suppress(OSError):  # a kernel without it
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")  # losses shall not hide the rate
    line.setblocking(False)
    begin, since, first = time.perf_counter(), 0.0, 0
    while (now := time.perf_counter()) < (since or begin + plan.warm_s) + plan.count_s:
        if not since and now - begin >= plan.warm_s:
            since, first = now, _delivered(line)
        if select.select([], [line], [], _TICK_S)[1]:
            with contextlib.suppress(BlockingIOError):
                line.send(_PIECE)
    return (_delivered(line) - first) / (now - since)


def _delivered(line: socket.socket) -> int:
    """Bytes of payload that the other side has acknowledged, in order or selectively."""
    info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    packet_bytes, sacked = (struct.unpack_from("=I", info, place)[0] for place in (_SND_MSS_AT, _SACKED_AT))
    return int(struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0] + sacked * packet_bytes)


def sink(line: socket.socket) -> None:
    """Read until the other side has gone."""
    line.settimeout(_SILENCE_S)
    with contextlib.suppress(OSError):
        while line.recv(1 << 20):
            pass


def measure(address: str, plan: Plan) -> None:
    """Do what standard input says, one answer a line."""
    pool = ThreadPoolExecutor(plan.streams)
    for word in sys.stdin:
        do = word.strip()
        if do == "ping":
            answer: object = ping(address, plan)
        else:
            answer = sum(map(Future.result, [pool.submit(stream, address, do, plan) for _ in range(plan.streams)]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def stream(address: str, do: str, plan: Plan) -> float:
    """One TCP stream, "up" from here or "down" to here; bytes of payload a second."""
    with _ask(address, {"do": do, **asdict(plan)}) as line:
        key = _key(line.getsockname())
        if do == "up":
            rate = push(line, plan)
            _reset(line)
            return rate
        sink(line)
    with _ask(address, {"do": "rate", "key": key}) as line, line.makefile("rb") as lines:
        return float(json.loads(lines.readline()))


def _ask(address: str, order: dict[str, object]) -> socket.socket:
    line = socket.create_connection((address, PORT), timeout=_SILENCE_S)
    line.sendall(json.dumps(order).encode() + b"\n")
    return line


def _key(name: tuple[str, int]) -> str:
    """A connection is known by its asker's end."""
    return f"{name[0]}:{name[1]}"


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
    rates: dict[str, float] = {}
    while True:
        line, name = listener.accept()
        threading.Thread(target=_stream, args=(line, _key(name), rates), daemon=True).start()


def _stream(line: socket.socket, key: str, rates: dict[str, float]) -> None:
    """Do what the other side asks for in its first line. The rate of a stream down is asked for afterwards: on the
    stream itself it would wait behind all that is still to be sent."""
    with line, line.makefile("rb") as lines, contextlib.suppress(OSError):
        order = json.loads(lines.readline())
        match order.pop("do"):
            case "down":
                rates[key] = push(line, Plan(**order))
                _reset(line)
            case "rate":
                line.sendall(json.dumps(rates.pop(order["key"])).encode() + b"\n")
            case _:
                sink(line)


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
