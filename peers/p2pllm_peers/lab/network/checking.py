"""Measuring all lines of a lab at once with real traffic, each peer against a namespace without any shaping.

First datagrams on idle lines, for delay and loss; then TCP streams from every peer, then to every peer. What does
not live here: the programs that send and receive (`probe`).
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any

from p2pllm.errors import RunError
from p2pllm_peers.lab.evidence import LinkCheck
from p2pllm_peers.lab.network.probe import Plan
from p2pllm_peers.lab.scenario import Link

WIRE_PER_PAYLOAD = 1514 / 1448
"""A full packet of a TCP stream with timestamps: 1448 bytes of payload, 52 of IP and TCP, 14 of Ethernet."""

_PINGS, _PINGS_FOR_LOSS = 200, 2000
_PING_BYTES = 12 + 28 + 14
_PINGS_PER_S = 4000  # of all peers together: more would measure the processor
_PING_SHARE = 0.1  # of the line
_STREAM_PACKETS = 300  # a rate is counted over at least so many
_FIRST_WINDOW = 10 * 1448  # what TCP sends before the first acknowledgement; then it doubles every round trip
_STREAMS = 4  # one alone may take long to find the rate when it loses a packet at the wrong moment
_ANSWER_TIMEOUT_S = 60.0


def measure(
    peers: Mapping[str, Sequence[str]], probe: Sequence[str], address: str, links: Mapping[str, Link]
) -> list[LinkCheck]:
    """What every line does.

    peers: words before a command that run it on each peer's machine; probe, address: the same of the namespace
    without shaping, and its address. Raises RunError if a measurement does not end.
    """
    module = [sys.executable, "-m", "p2pllm_peers.lab.network.probe"]
    plans = {name: plan(link, len(links)) for name, link in links.items()}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(program([*probe, *module, "serve"]))
        answer(server, "the probe")
        programs = {
            name: stack.enter_context(program([*prefix, *module, "measure", address, json.dumps(asdict(plans[name]))]))
            for name, prefix in peers.items()
        }
        trips, up, down = (phase(programs, word) for word in ("ping", "up", "down"))
    return [_row(name, link, trips[name], up[name], down[name]) for name, link in links.items()]


def plan(link: Link, peers: int) -> Plan:
    """How a line is measured when `peers` are measured at once: long enough to mean something, no longer."""
    slower, faster = sorted(mbit * 1e6 / 8 for mbit in (link.up_mbit, link.down_mbit))
    ping_every_s = max(peers / _PINGS_PER_S, _PING_BYTES / (slower * _PING_SHARE))
    trip_s = 2 * (_delay_ms(link) + link.jitter_ms) / 1e3
    doublings = math.log2(max(1.0, faster * trip_s / _FIRST_WINDOW))
    return Plan(
        pings=max(50, min(_PINGS_FOR_LOSS if link.loss else _PINGS, round(2 / ping_every_s))),
        ping_every_s=ping_every_s,
        wait_s=trip_s + 0.3,
        warm_s=0.5 + (doublings + 4) * trip_s,  # congestion control finds the rate
        count_s=min(max(3.0 if link.loss else 1.5, _STREAM_PACKETS * 1514 / slower, 4 * trip_s), 4.0),
        streams=_STREAMS,
    )


def _row(name: str, link: Link, trips: dict[str, float], up: float, down: float) -> LinkCheck:
    """Jitter makes each way longer by half of it on average; that is not the delay that was asked for."""
    if trips["lost"] == 1:
        raise RunError(f"The line of {name} carries nothing at all.")
    return LinkCheck(
        peer=name,
        asked_up_mbit=link.up_mbit,
        measured_up_mbit=up * WIRE_PER_PAYLOAD * 8e-6,
        asked_down_mbit=link.down_mbit,
        measured_down_mbit=down * WIRE_PER_PAYLOAD * 8e-6,
        asked_delay_ms=_delay_ms(link),
        measured_delay_ms=max(0.0, (trips["trip_ms"] - link.jitter_ms) / 2),
        asked_loss=1 - (1 - link.loss) ** 2,
        measured_loss=trips["lost"],
    )


def _delay_ms(link: Link) -> float:
    """One way, drawn before."""
    assert not isinstance(link.delay_ms, tuple)  # noqa: S101 - a scenario draws it
    return link.delay_ms


def phase(programs: Mapping[str, subprocess.Popen[bytes]], word: str) -> dict[str, Any]:
    """All do the same at once; returns what each measured."""
    for program in programs.values():
        with contextlib.suppress(OSError):  # it has ended; the missing answer says so
            _pipe(program.stdin).write(word.encode() + b"\n")
            _pipe(program.stdin).flush()
    return {name: json.loads(answer(program, name)) for name, program in programs.items()}


def answer(program: subprocess.Popen[bytes], name: str) -> bytes:
    """Its next line. Raises RunError."""
    stdout = _pipe(program.stdout)
    if select.select([stdout], [], [], _ANSWER_TIMEOUT_S)[0] and (line := stdout.readline()):
        return line
    program.kill()
    errors = program.communicate()[1].decode(errors="replace").strip().splitlines()
    raise RunError(f"The line of {name} could not be measured: {errors[-1] if errors else 'no answer'}.")


@contextlib.contextmanager
def program(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A running program that ends with its standard input, and in any case with the context."""
    pipe = subprocess.PIPE
    program = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        yield program
    finally:
        program.kill()
        program.communicate()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # noqa: S101 - it was asked for
    return stream
