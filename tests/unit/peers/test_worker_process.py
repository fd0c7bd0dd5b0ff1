"""The worker's process: what it does when its daemon is gone, however early."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from p2pllm_peers.worker_process import WorkerProcess, shared_file

TIMEOUT_S = 60.0


@pytest.mark.parametrize("heard", ["", '{"draft": {"na'])
async def test_a_worker_whose_daemon_was_killed_before_its_job_ends_and_removes_the_sockets(
    tmp_path: Path, heard: str
) -> None:
    sockets = tmp_path / "runtime"
    sockets.mkdir()
    (sockets / "p2pd.sock").touch()
    memory = shared_file()
    worker = await WorkerProcess.launch(memory, sockets, lambda event: None)
    stdin = worker._process.stdin
    assert stdin is not None
    stdin.write(heard.encode())
    stdin.close()
    async with asyncio.timeout(TIMEOUT_S):
        assert await worker.wait() == 0
    assert not sockets.exists()
    os.close(memory)
