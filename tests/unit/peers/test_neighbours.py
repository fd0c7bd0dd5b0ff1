"""Peers of one machine share its limits, and take them anew when one comes or goes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pllm.settings import load_settings
from p2pllm_peers import neighbours
from p2pllm_peers.folders import RunFolder
from p2pllm_peers.neighbours import running_peers, watch_neighbours
from p2pllm_peers.participant import Participant


def test_each_peer_goes_by_its_part() -> None:
    peer: Any = Participant.__new__(Participant)
    pacer, intake = SimpleNamespace(mbit=0.0), SimpleNamespace(mbit=0.0)
    peer._settings = load_settings(cpu_percent=60, upload_mbit=9, monthly_gb=4)
    peer._throttle, peer._keeper = SimpleNamespace(), SimpleNamespace(disk=SimpleNamespace())
    peer._node = SimpleNamespace(traffic=SimpleNamespace(pacer=pacer, intake=intake))
    peer._share(3)
    assert (peer._throttle.cpu_percent, pacer.mbit, intake.mbit) == (20, 3, 0)
    peer._share(1)
    assert (peer._throttle.cpu_percent, pacer.mbit, intake.mbit) == (60, 9, 0)
    peer._settings = load_settings()
    peer._share(2)
    assert (peer._throttle.cpu_percent, pacer.mbit) == (100, 0), "no limit is none for everybody"


async def test_who_comes_and_goes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "LOOK_S", 0.001)
    assert running_peers(tmp_path) == 1
    seen: asyncio.Queue[int] = asyncio.Queue()
    own = RunFolder(tmp_path, "ab" * 32).peer("founder").lock()
    os.close(RunFolder(tmp_path, "ab" * 32).peer("stopped").lock())
    watching = asyncio.create_task(watch_neighbours(tmp_path, seen.put_nowait))
    async with asyncio.timeout(10):
        assert await seen.get() == 1
        other = RunFolder(tmp_path, "cd" * 32).peer("volunteer").lock()
        assert await seen.get() == 2
        os.close(other)
        assert await seen.get() == 1
    watching.cancel()
    os.close(own)
