"""The daemon's control socket: how the commands of this machine talk to it.

A Unix socket with mode 0600 in a folder with mode 0700. One request a connection: a JSON object on a line with
"do"; the reply is one JSON object a line, or for "watch" one every interval until the caller hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from p2pllm.errors import DaemonError

MAX_REQUEST_BYTES = 64 * 1024
WATCH_INTERVAL_S = 0.5

Reply = dict[str, Any]
Handler = Callable[[dict[str, Any]], Awaitable[Reply]]


class ControlServer:
    """Answers requests by name."""

    def __init__(self, path: Path, handlers: dict[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen; the folder must exist and be private."""
        self._server = await asyncio.start_unix_server(self._on_connection, self._path, limit=MAX_REQUEST_BYTES)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening, hang up, and remove the socket."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.close()
        self._path.unlink(missing_ok=True)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            async with asyncio.timeout(10):
                request = json.loads(await reader.readline())
            await self._answer(request if isinstance(request, dict) else {}, writer)
        except (OSError, ValueError, TimeoutError):
            return  # a caller that hung up or spoke nonsense
        except asyncio.CancelledError:
            return  # the daemon ends; asyncio would log a cancelled handler as an error
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        watching = request.get("do") == "watch"
        handler = self._handlers.get("status" if watching else str(request.get("do")))
        while True:
            reply = {"error": "unknown request"} if handler is None else await handler(request)
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
            if not watching:
                return
            await asyncio.sleep(WATCH_INTERVAL_S)


def ask(path: Path | str, request: dict[str, Any], timeout: float = 10.0) -> Reply:
    """Send one request and return its reply. Raises DaemonError if the daemon does not answer."""
    for reply in _replies(path, request, timeout):
        return reply
    raise DaemonError("The daemon hung up without an answer; look at `p2pllm logs`.")


def watch(path: Path | str, timeout: float = 30.0) -> Iterator[Reply]:
    """The daemon's status about twice a second, until it ends."""
    with contextlib.suppress(DaemonError):
        yield from (reply for reply in _replies(path, {"do": "watch"}, timeout) if "error" not in reply)


def _replies(path: Path | str, request: dict[str, Any], timeout: float) -> Iterator[Reply]:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DaemonError(f"The daemon does not answer ({reason}); look at `p2pllm status`.") from None
