"""What every target promises: an answer within SECONDS of computing, and no more memory than it states."""

from __future__ import annotations

import functools
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = 1.0
"""Of this thread's CPU time for one input, so that other programs on the machine do not count."""


class BrokenPromiseError(AssertionError):
    """An input that a decoder does not stand."""


@dataclass(frozen=True)
class Target:
    """One decoder, or some that take the same bytes.

    read: gives it one input; whether it was taken. seeds: inputs that are taken, made by the real encoders. max_bytes:
    longest input worth trying. memory: bytes that one input may cost at most, over what is there before and after.
    is_json: the input is JSON, not msgpack.
    """

    name: str
    read: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    max_bytes: int
    memory: int
    is_json: bool = False

    def begin(self) -> None:
        """Start to measure memory, with all that is imported or remembered once already there."""
        for seed in self.seeds():
            self.read(seed)
        if not tracemalloc.is_tracing():
            tracemalloc.start()

    def keep(self, data: bytes, seconds: float = SECONDS) -> bool:
        """Read one input, after `begin`; whether it was taken. Raises BrokenPromiseError, or whatever `read` raises."""
        tracemalloc.reset_peak()
        before, started = tracemalloc.get_traced_memory()[0], time.thread_time()
        taken = self.read(data)
        took, (after, most) = time.thread_time() - started, tracemalloc.get_traced_memory()
        peak = most - max(before, after)  # what stays is in caches, each of which has a bound of its own
        if took > seconds:
            raise BrokenPromiseError(f"{self.name}: {len(data)} bytes took {took:.2f} s")
        if peak > self.memory:
            raise BrokenPromiseError(f"{self.name}: {len(data)} bytes took {peak} bytes of memory, not {self.memory}")
        return taken


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


def check(holds: bool, what: str) -> None:
    """Raise BrokenPromiseError unless it holds."""
    if not holds:
        raise BrokenPromiseError(what)
