"""`p2pllm status --follow`: it shows a peer that runs by itself, and only the view ends with Ctrl+C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from p2pllm_cli.view import status_line
from p2pllm_peers.control import ControlServer, ask
from p2pllm_peers.folders import PeerFolder, RunFolder

STATUS = {
    "recorded_round": 7,
    "rounds": 100,
    "loss": 3.25,
    "validation_loss": None,
    "peers": [],
    "swarm_tokens_per_s": 1000.0,
    "bytes_sent": 0,
    "bytes_received": 0,
}
LIMIT_S = 60.0


@pytest.fixture
def peer(peer_env: Any) -> PeerFolder:
    peer = RunFolder(peer_env.home, "5a" * 8).peer("founder")
    os.close(peer.lock())
    (peer.run.path / "manifest.json").write_text("{}")
    return peer


@pytest.fixture
async def daemon(peer_env: Any, peer: PeerFolder) -> AsyncIterator[ControlServer]:
    """What answers as the peer's daemon would."""

    async def status(_: dict[str, Any]) -> dict[str, Any]:
        return STATUS

    handle = peer.lock()
    server = ControlServer(peer_env.runtime / "control", {"status": status})
    await server.start()
    (peer.path / "daemon.json").write_text(json.dumps({"socket": str(peer_env.runtime / "control")}))
    yield server
    await server.close()
    os.close(handle)


def printed(process: subprocess.Popen[bytes], output: Path, words: str) -> None:
    end = time.monotonic() + LIMIT_S
    while words not in output.read_text():
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.02)  # another process prints; there is no event to wait for


def lines(output: Path) -> list[str]:
    return output.read_text().splitlines()


@pytest.mark.parametrize("as_json", [False, True])
async def test_the_view_ends_alone(peer_env: Any, daemon: ControlServer, as_json: bool) -> None:
    output: Path = peer_env.folder / "output.txt"
    process = peer_env.start("status", "--follow", *["--json"] * as_json, output=output)
    line = json.dumps(STATUS) if as_json else status_line(STATUS)
    await asyncio.to_thread(printed, process, output, line)
    process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(process.wait, LIMIT_S) == 0
    assert set(lines(output)) == {line}
    assert await asyncio.to_thread(ask, peer_env.runtime / "control", {"do": "status"}) == STATUS


async def test_the_view_ends_with_the_peer(peer_env: Any, daemon: ControlServer) -> None:
    output: Path = peer_env.folder / "output.txt"
    process = peer_env.start("status", "--follow", output=output)
    await asyncio.to_thread(printed, process, output, "round 7/100")
    await daemon.close()
    assert await asyncio.to_thread(process.wait, LIMIT_S) == 0
    assert lines(output) == [status_line(STATUS), "'founder' has ended, or does not answer."]


def test_a_peer_that_does_not_run_is_refused(peer_env: Any, peer: PeerFolder) -> None:
    peer_env.refuses(1, ["'founder' is not running", "nothing to follow"], "status", "--follow")
    handle = peer.lock()
    peer_env.refuses(1, ["'founder' is still starting"], "status", "--follow")
    os.close(handle)
