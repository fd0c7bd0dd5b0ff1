"""What every target promises: an answer within SECONDS of computing, and no more memory than it states."""

from __future__ import annotations

import contextlib
import functools
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

SECONDS = 1.0
"""Of this thread's CPU time for one input, so that other programs on the machine do not count."""


class BrokenPromiseError(AssertionError):
    """An input that a decoder does not stand."""


@dataclass(frozen=True)
class Target:
    """One decoder, or some that take the same bytes.

    read: gives it one input; whether it was taken. seeds: inputs that are taken, made by the real encoders. max_bytes:
    longest input worth trying. memory: bytes that one input may cost at most, without what stays after it.
    is_json: the input is JSON, not msgpack.
    """

    name: str
    read: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    max_bytes: int
    memory: int
    is_json: bool = False

    def begin(self) -> None:
        """Import and remember what is imported or remembered once, so that no input pays for it."""
        for seed in self.seeds():
            self.read(seed)

    def keep(self, data: bytes, seconds: float = SECONDS) -> bool:
        """Read one input, after `begin`; whether it was taken. Raises BrokenPromiseError, or whatever `read` raises.

        Who reads millions of them turns tracemalloc on before: each time it is turned on and off it loses about 1 kB.
        """
        with _traced():
            before, started = tracemalloc.get_traced_memory()[0], time.thread_time()
            taken = self.read(data)
            took, (after, peak) = time.thread_time() - started, tracemalloc.get_traced_memory()
        cost = peak - max(before, after)  # what stays is in caches, each of which has a bound of its own
        if took > seconds:
            raise BrokenPromiseError(f"{self.name}: {len(data)} bytes took {took:.2f} s")
        if cost > self.memory:
            raise BrokenPromiseError(f"{self.name}: {len(data)} bytes took {cost} bytes of memory, not {self.memory}")
        return taken


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    """Measure memory, and no longer than needed unless it was measured before: it slows everything down."""
    was_on = tracemalloc.is_tracing()
    if not was_on:
        tracemalloc.start()
    tracemalloc.reset_peak()
    try:
        yield
    finally:
        if not was_on:
            tracemalloc.stop()


TARGETS: dict[str, Target] = {}
"""By name; `targets` fills it."""


def target(
    seeds: Callable[[], list[bytes]], *, max_bytes: int, memory: int, is_json: bool = False
) -> Callable[[Callable[[bytes], bool]], Callable[[bytes], bool]]:
    """Register a function as the target of its name; see Target."""

    def register(read: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
        made = functools.cache(seeds)  # of signatures, which take their time
        TARGETS[read.__name__] = Target(read.__name__, read, made, max_bytes, memory, is_json)
        return read

    return register


def parts_of(data: bytes) -> Any:
    """What an input consists of that is msgpack, if a target needs more than one thing. Raises ValueError.

    Bounded, since this is not the decoder that is to be measured.
    """
    try:
        return msgpack.unpackb(data, max_array_len=100, max_map_len=100, max_ext_len=0)
    except Exception as error:  # noqa: BLE001 - msgpack raises many kinds
        raise ValueError(str(error)) from None


def check(holds: bool, what: str) -> None:
    """Raise BrokenPromiseError unless it holds."""
    if not holds:
        raise BrokenPromiseError(what)
