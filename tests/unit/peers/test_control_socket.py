"""The control socket: private, one answer a request, and deaf to nonsense."""

import asyncio
import contextlib
import json
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from p2pllm.errors import DaemonError
from p2pllm_peers import control
from p2pllm_peers.control import MAX_REQUEST_BYTES, ControlServer, ask, watch


@pytest.fixture
def path():
    """Short: the path of a Unix socket has about a hundred bytes."""
    with tempfile.TemporaryDirectory(prefix="p2pllm-") as folder:
        yield Path(folder) / "control.sock"


@pytest.fixture
async def server(path: Path):
    seen = []

    async def echo(request):
        seen.append(request)
        return {"got": request, "count": len(seen)}

    server = ControlServer(path, {"echo": echo, "status": echo})
    await server.start()
    yield server
    await server.close()


def say(path: Path, data: bytes) -> bytes:
    """Send raw bytes, hang up our half, and read all that comes back."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as reply:
            return reply.read()


async def test_a_question_has_one_answer(server, path: Path) -> None:
    reply = await asyncio.to_thread(ask, path, {"do": "echo", "what": "é\n"})
    assert reply == {"got": {"do": "echo", "what": "é\n"}, "count": 1}


def test_only_we_may_talk_to_it(server, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("do", ["nonsense", None, 7, ["echo"], ""])
async def test_an_unknown_request_is_answered_as_such(server, path: Path, do: object) -> None:
    assert await asyncio.to_thread(ask, path, {"do": do}) == {"error": "unknown request"}


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"nonsense\n", b"\xff\xfe\n", b"{\n", b"[" * 5000 + b"\n", b"x" * (MAX_REQUEST_BYTES + 9) + b"\n"],
    ids=["nothing", "line", "words", "bytes", "half", "nested", "long"],
)
async def test_nonsense_is_hung_up_on_and_harms_nobody(server, path: Path, data: bytes) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it hung up while we were still talking
        assert await asyncio.to_thread(say, path, data) == b""
    assert (await asyncio.to_thread(ask, path, {"do": "echo"}))["count"] == 1


@pytest.mark.parametrize("data", [b"[]\n", b"7\n", b"null\n", b"{}\n"])
async def test_json_that_is_no_request(server, path: Path, data: bytes) -> None:
    assert json.loads(await asyncio.to_thread(say, path, data)) == {"error": "unknown request"}


async def test_watching_goes_on_until_the_daemon_ends(server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "WATCH_INTERVAL_S", 0.001)
    replies = await asyncio.to_thread(lambda: [r["count"] for r, _ in zip(watch(path), range(3), strict=False)])
    assert replies == [1, 2, 3]


async def test_watching_ends_with_the_daemon(server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "WATCH_INTERVAL_S", 0.001)
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()

    def look() -> int:
        return sum(1 for _ in watch(path) if loop.call_soon_threadsafe(seen.set) is not None)

    async def end() -> None:
        await seen.wait()
        await server.close()

    count, _ = await asyncio.wait_for(asyncio.gather(asyncio.to_thread(look), end()), 10)
    assert count >= 1
    assert not await asyncio.to_thread(path.exists)


def test_a_daemon_that_is_gone_is_one_sentence(path: Path) -> None:
    with pytest.raises(DaemonError, match=r"does not answer.*p2pllm status") as caught:
        ask(path, {"do": "status"})
    assert "Errno" not in str(caught.value)
    assert list(watch(path)) == []


async def test_who_watches_hears_no_errors(path: Path) -> None:
    """As of a daemon that is leaving, and cannot say where it is any more."""
    replies = [{"error": "too late"}, {"round": 7}]

    async def status(request):
        return replies.pop(0) if replies else {"round": 8}

    server = ControlServer(path, {"status": status})
    await server.start()
    try:
        assert await asyncio.to_thread(next, watch(path)) == {"round": 7}
    finally:
        await server.close()
