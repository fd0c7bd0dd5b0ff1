"""Running the page's server until the user ends it. What does not live here: what it answers (`server`)."""

from __future__ import annotations

import asyncio
import html
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from p2pllm.errors import PortError
from p2pllm_peers.dashboard.server import Dashboard

_GRACE_S = 1.0
"""How long open requests may take when the server ends."""


def run(dashboard: Dashboard, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; `ready` is called with the address to open. Raises PortError."""
    asyncio.run(_run(dashboard, host, port, ready))


async def _run(dashboard: Dashboard, host: str, port: int, ready: Callable[[str], None]) -> None:
    ended = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last: the terminal was closed
        asyncio.get_running_loop().add_signal_handler(sign, ended.set)
    runner = web.AppRunner(dashboard.app(), access_log=None, shutdown_timeout=_GRACE_S)
    await runner.setup()
    try:
        ready(await listen(dashboard, runner, host, port))
        await ended.wait()
    finally:
        await runner.cleanup()


async def listen(dashboard: Dashboard, runner: web.AppRunner, host: str, port: int) -> str:
    """Listen, and return the address with the token. Raises PortError if the port cannot be had."""
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise PortError(
            f"Cannot listen on {host} port {port} ({error.strerror or error}); choose another with --port."
        ) from None
    guard = dashboard.guard
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    guard.host, guard.port = name, runner.addresses[0][1]
    return f"http://{name}:{guard.port}/" + ("" if guard.public else f"?token={guard.token}")


def has_screen() -> bool:
    """Whether a browser would have a window; a text browser would take the terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def door(url: str, folder: Path) -> Iterator[Path]:
    """A file that leads a browser to `url`, until the context ends.

    All users of a machine see what programs are started with, so a browser is given the file, which only ours can read.
    """
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".page-", suffix=".html", encoding="utf-8") as file:
        goal = html.escape(url)
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={goal}"><a href="{goal}">p2pllm</a>\n')
        file.flush()
        yield Path(file.name)
