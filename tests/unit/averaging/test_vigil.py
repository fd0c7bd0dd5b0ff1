"""Whom we wait for: several streams to one peer share what it does, and only what it does of the same kind."""

from __future__ import annotations

import asyncio

import pytest

from p2pllm.averaging.vigil import GaveUp, Vigil, Want
from p2pllm.testing import virtual

STALL_S = 4.0


@virtual
async def test_a_stream_that_stands_while_another_one_moves_is_no_fault() -> None:
    vigil = Vigil(STALL_S)
    one, other = vigil.wait("peer", Want.INPUT), vigil.wait("peer", Want.INPUT)
    watching = asyncio.create_task(vigil.watch())
    with one.waiting(), other.waiting():
        for _ in range(20):
            await asyncio.sleep(1.0)
            one.touch()
        assert not watching.done() and other.silence() < 1e-3
        await asyncio.sleep(2 * STALL_S)
    with pytest.raises(GaveUp, match="the values of peer"):
        await watching
    assert vigil.longest_silence == pytest.approx(2 * STALL_S)


@virtual
async def test_who_takes_and_gives_nothing_is_at_fault() -> None:
    vigil = Vigil(STALL_S)
    taking, giving = vigil.wait("peer", Want.GIVE), vigil.wait("peer", Want.INPUT)
    watching = asyncio.create_task(vigil.watch())
    with taking.waiting(), giving.waiting():
        for _ in range(8):
            taking.touch()
            await asyncio.wait({watching}, timeout=1.0)
    with pytest.raises(GaveUp, match="the values of peer"):
        await watching
