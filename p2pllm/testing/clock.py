"""The virtual clock: an event loop whose time jumps to the next timer as soon as nothing else can happen.

Minutes of a swarm pass in milliseconds, and every run takes the same steps in the same order. There are no threads:
what code hands to an executor (`asyncio.to_thread`) is done at once, in no time. Real sockets work as long as both
ends are in this process. `time.monotonic` and `time.time` are not changed; code under test asks its loop.

What does not live here: the network (`network`), and making tests of coroutines that wait for real things.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import selectors
from asyncio import Handle, TimerHandle
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

START_S = 1000.0
"""Time at which every virtual loop begins, so that nothing passes by taking 0 for "never"."""

TICK_S = 1e-6
"""Timers come up to this much early, so that rounding never leaves one that is neither due nor in the future."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DeadlockError(RuntimeError):
    """Everything waits, and no timer is left that could end it. The text names the tasks that wait and where."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time; `time()` is in seconds and begins at START_S."""

    def __init__(self) -> None:
        self._now = START_S
        self._frozen: dict[object, list[Handle]] = {}
        super().__init__(_JumpingSelector(self))
        self._clock_resolution = TICK_S

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Move the clock; only the selector calls this, when nothing is due before."""
        self._now += seconds

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Call `func` at once; there are no threads, so nothing depends on their timing."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever awaits it gets it, as from a thread
            future.set_exception(error)
        return future

    # -- stopping a part of the program, as SIGSTOP stops a process -------------------------------------------------

    def freeze(self, owner: object, mine: Callable[[Context], bool]) -> None:
        """Set aside all steps and timers whose context is `mine`, until `thaw(owner)`.

        What they wait for must not happen meanwhile; the network sees to that.
        """
        ready: Any = self._ready  # type: ignore[attr-defined]  # asyncio has no public way to look at them
        timers: list[TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        aside = [handle for handle in (*ready, *sorted(timers)) if mine(_context_of(handle))]
        ids = set(map(id, aside))
        nothing = Handle(lambda: None, (), self)
        nothing.cancel()
        # The loop, which is in the middle of a turn, has counted them and takes as many.
        left = [nothing if id(handle) in ids else handle for handle in ready]
        ready.clear()
        ready.extend(left)
        timers[:] = [timer for timer in timers if id(timer) not in ids]
        heapq.heapify(timers)
        self._frozen.setdefault(owner, []).extend(aside)

    def thaw(self, owner: object) -> None:
        """Let what was set aside go on; timers whose time has passed are due at once, in their order."""
        for handle in self._frozen.pop(owner, ()):
            if isinstance(handle, TimerHandle):
                heapq.heappush(self._scheduled, handle)  # type: ignore[attr-defined]
            else:
                self._ready.append(handle)  # type: ignore[attr-defined]

    def thaw_all(self) -> None:
        """Let everything go on, so that it can end."""
        for owner in list(self._frozen):
            self.thaw(owner)


def _context_of(handle: Handle) -> Context:
    context: Context = handle._context  # type: ignore[attr-defined]  # public only since Python 3.12
    return context


class _JumpingSelector(selectors.DefaultSelector):
    """Looks whether a socket is ready, never waits for one, and moves the clock instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._owner = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise DeadlockError(_who_waits(self._owner))
        self._owner.jump(timeout)
        return []


def _who_waits(loop: asyncio.AbstractEventLoop) -> str:
    """Sentence for a DeadlockError: every task and the line where it waits, at most 12 of them."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    places = []
    for task in tasks[:12]:
        places.append(f"{task.get_name()} at {_where(task.get_coro())}")
    more = f", and {len(tasks) - 12} more" if len(tasks) > 12 else ""
    return f"Everything waits for something that cannot come: {'; '.join(places) or 'no task is left'}{more}."


def _where(waiting: Any) -> str:
    """The innermost line of a coroutine that is not asyncio's own."""
    where = "an unknown place"
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None)
        if frame is not None and not frame.f_globals.get("__name__", "").startswith("asyncio."):
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        waiting = getattr(waiting, "cr_await", None)
    return where


def run(coroutine: Coroutine[Any, Any, T], loop_class: type[VirtualLoop] = VirtualLoop) -> T:
    """Run a coroutine to its end in virtual time; tasks that it leaves behind are cancelled.

    Raises DeadlockError if it waits for what cannot come, and whatever the coroutine raises.
    """
    loop = loop_class()

    async def to_the_end() -> T:
        try:
            return await coroutine
        finally:
            loop.thaw_all()  # what is frozen could not be cancelled

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(to_the_end())


def virtual(test: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., T]:
    """Decorate an async test: it runs in virtual time, with whatever arguments its runner gives it."""

    @functools.wraps(test)
    def in_virtual_time(*args: Any, **kwargs: Any) -> T:
        return run(test(*args, **kwargs))

    return in_virtual_time
