"""Pacing: all who send bulk share one rate, and what was not used is soon gone."""

from __future__ import annotations

import asyncio

from p2pllm.network.pacing import BURST_S, ON_THE_LINE, Pacer
from p2pllm.testing import virtual

MBIT = 8.0 * ON_THE_LINE  # a million bytes of payload a second


async def sender(pacer: Pacer, pieces: int, size: int = 10_000) -> float:
    """When its last piece was let go."""
    for _ in range(pieces):
        await pacer.pay(size)
    return asyncio.get_running_loop().time()


@virtual
async def test_several_share_the_rate() -> None:
    pacer, clock = Pacer(MBIT), asyncio.get_running_loop().time
    began = clock()
    ends = await asyncio.gather(sender(pacer, 100), sender(pacer, 100), sender(pacer, 200))
    assert abs(max(ends) - began - 4.0) < 2 * BURST_S
    assert abs(ends[0] - ends[1]) < 0.1, "in turn"


@virtual
async def test_what_was_not_used_is_not_saved() -> None:
    pacer, clock = Pacer(MBIT), asyncio.get_running_loop().time
    await sender(pacer, 1)
    await asyncio.sleep(100.0)
    began = clock()
    await sender(pacer, 100)
    assert 1.0 - 2 * BURST_S < clock() - began < 1.0 + BURST_S


@virtual
async def test_a_little_goes_at_once() -> None:
    pacer, clock = Pacer(MBIT), asyncio.get_running_loop().time
    await asyncio.sleep(1.0)
    began = clock()
    await pacer.pay(int(BURST_S * 1e6) - 1)
    assert clock() == began
