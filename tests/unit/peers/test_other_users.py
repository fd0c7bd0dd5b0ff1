"""What another user of this machine, who really tries, gets of a peer: nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pllm.identity import Identity
from p2pllm_peers.control import ControlServer, ask
from p2pllm_peers.dashboard.serving import door
from p2pllm_peers.folders import write_whole

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try as somebody else")

NOBODY = 65534

ATTEMPT = """
import os, socket, sys
uid, kind, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
try:
    if kind == "socket":
        socket.socket(socket.AF_UNIX).connect(path)
    else:
        os.open(path, os.O_RDWR if kind == "write" else os.O_RDONLY)
except PermissionError:
    sys.exit(13)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into, so that only what is in it can refuse them."""
    folder = Path(tempfile.mkdtemp(prefix="p2pllm-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def gets_in(kind: str, path: Path, uid: int) -> bool:
    """Whether a program of this user could."""
    done = subprocess.run([sys.executable, "-c", ATTEMPT, str(uid), kind, str(path)], timeout=60)
    assert done.returncode in (0, 13)
    return done.returncode == 0


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("what", ["key", "daemon.json", "page"])
def test_nobody_else_gets_at_the_files(open_folder: Path, what: str, kind: str) -> None:
    with door("http://127.0.0.1:1/?token=secret", open_folder) as page:
        key, daemon = open_folder / "peer.key", open_folder / "daemon.json"
        Identity.load_or_create(key)
        write_whole(daemon, b"{}")
        path = {"key": key, "daemon.json": daemon, "page": page}[what]
        assert gets_in(kind, path, 0) and not gets_in(kind, path, NOBODY)


async def test_nobody_else_can_talk_to_the_daemon(open_folder: Path) -> None:
    async def status(_: dict[str, object]) -> dict[str, object]:
        return {"round": 7}

    path = open_folder / "control.sock"
    server = ControlServer(path, {"status": status})
    await server.start()
    try:
        assert not await asyncio.to_thread(gets_in, "socket", path, NOBODY)
        assert await asyncio.to_thread(gets_in, "socket", path, 0)
        assert (await asyncio.to_thread(ask, path, {"do": "status"})) == {"round": 7}
    finally:
        await server.close()
