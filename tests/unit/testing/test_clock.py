"""The virtual clock: the order of things, time that jumps, waiting for nothing, and parts that stand still."""

from __future__ import annotations

import asyncio
import contextvars
import random
import socket
import time

import pytest

from p2pllm.testing import DeadlockError, VirtualLoop, run, virtual
from p2pllm.testing.clock import START_S

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="")


@virtual
async def test_timers_come_in_their_order_and_time_is_exact():
    loop = asyncio.get_running_loop()
    seen: list[tuple[str, float]] = []
    for name, after in [("c", 3.0), ("a", 0.1), ("d", 86_400.0 * 30), ("b", 0.1)]:
        loop.call_later(after, lambda name=name: seen.append((name, loop.time() - START_S)))
    await asyncio.sleep(86_400.0 * 31)
    assert [name for name, _ in seen] == ["a", "b", "c", "d"]
    assert [at for _, at in seen] == pytest.approx([0.1, 0.1, 3.0, 86_400.0 * 30], abs=1e-6)


def test_a_year_passes_in_no_time():
    async def wait() -> float:
        begin = asyncio.get_running_loop().time()
        for _ in range(365):
            await asyncio.sleep(86_400.0)
        return asyncio.get_running_loop().time() - begin

    before = time.process_time()
    assert run(wait()) == pytest.approx(365 * 86_400.0)
    assert time.process_time() - before < 5.0


@virtual
async def test_time_stands_still_while_something_can_happen():
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for _ in range(100):
        await asyncio.sleep(0)
    assert loop.time() == begin


@virtual
async def test_time_outs_strike():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await asyncio.sleep(6.0)
    assert asyncio.get_running_loop().time() == pytest.approx(START_S + 5.0)


def test_waiting_for_nothing_is_an_error_that_names_who_waits():
    async def forgotten_lock() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(forgotten_lock(), name="the forgotten one")
        await task

    with pytest.raises(DeadlockError, match=r"cannot come: .*the forgotten one at .*test_clock\.py:\d+"):
        run(main())


def test_what_is_left_behind_is_cancelled():
    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(endless())
        await asyncio.sleep(1)
        return task

    assert run(main()).cancelled()
    assert ended == [True]


def test_errors_and_results_and_arguments_come_through():
    @virtual
    async def divide(a: int, *, b: int) -> float:
        """How much is it?"""
        await asyncio.sleep(1)
        return a / b

    assert divide(6, b=3) == 2
    assert divide.__doc__ == "How much is it?"
    with pytest.raises(ZeroDivisionError):
        divide(1, b=0)


@virtual
async def test_work_for_threads_is_done_at_once():
    loop = asyncio.get_running_loop()
    begin = loop.time()
    assert await asyncio.to_thread(sum, [1, 2]) == 3
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(lambda: 1 / 0)
    assert loop.time() == begin


@virtual
async def test_real_sockets_work_beside_timers():
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        loop.call_later(3.0, theirs.send, b"late")
        assert await loop.sock_recv(ours, 10) == b"late"
    assert loop.time() == pytest.approx(START_S + 3.0)


@virtual
async def test_a_part_stands_still_and_goes_on_with_what_is_overdue():
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    ticks: dict[str, list[float]] = {"a": [], "b": []}

    async def tick(name: str) -> None:
        while True:
            await asyncio.sleep(1.0)
            ticks[name].append(round(loop.time() - START_S, 3))

    contexts = {name: contextvars.copy_context() for name in ticks}
    for name, context in contexts.items():
        context.run(WHO.set, name)
        asyncio.get_running_loop().create_task(tick(name), context=context)
    await asyncio.sleep(2.5)
    loop.freeze("key", lambda context: context.get(WHO) == "a")
    await asyncio.sleep(3.0)
    loop.thaw("key")
    await asyncio.sleep(1.2)
    assert ticks["a"] == [1.0, 2.0, 5.5, 6.5]
    assert ticks["b"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@virtual
async def test_the_others_keep_their_order_while_a_part_stands_still():
    loop, draw = asyncio.get_running_loop(), random.Random(1)
    assert isinstance(loop, VirtualLoop)
    context = contextvars.copy_context()
    context.run(WHO.set, "a")
    seen: list[float] = []
    for _ in range(500):
        loop.call_later(draw.random() * 100, lambda: None, context=context)
        when = loop.time() + draw.random() * 100
        loop.call_at(when, seen.append, when)
    loop.freeze("key", lambda context: context.get(WHO) == "a")
    await asyncio.sleep(101.0)
    assert len(seen) == 500
    assert seen == sorted(seen)


@virtual
async def test_a_part_can_be_stopped_in_the_middle_of_a_turn():
    """What was about to run in this turn waits, too, and all else runs in it."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    context = contextvars.copy_context()
    context.run(WHO.set, "a")
    done: list[str] = []
    loop.call_soon(loop.freeze, "key", lambda context: context.get(WHO) == "a")
    loop.call_soon(lambda: done.append("a"), context=context)
    loop.call_soon(done.append, "b")
    await asyncio.sleep(1.0)
    assert done == ["b"]
    loop.thaw("key")
    await asyncio.sleep(1.0)
    assert done == ["b", "a"]


def test_what_stands_still_can_be_ended():
    async def main() -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        context = contextvars.copy_context()
        context.run(WHO.set, "a")
        task = loop.create_task(asyncio.sleep(1.0), context=context)
        await asyncio.sleep(0)
        loop.freeze("key", lambda context: context.get(WHO) == "a")
        await asyncio.sleep(10.0)
        assert not task.done()
        return task

    assert run(main()).done()
