"""Running the page's server until the user ends it. What does not live here: what it answers (`server`)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import webbrowser
from collections.abc import Callable

from aiohttp import web

from p2pllm.errors import PortError
from p2pllm_peers.dashboard.server import Dashboard

_GRACE_S = 1.0
"""How long open requests may take when the server ends."""


def run(dashboard: Dashboard, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is called with the address to open. Raises PortError."""
    asyncio.run(_run(dashboard, host, port, ready))


async def _run(dashboard: Dashboard, host: str, port: int, ready: Callable[[str], None]) -> None:
    ended = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
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


def open_browser(url: str) -> bool:
    """Open the user's browser, if this machine has a screen; whether it did."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False  # a text browser would take the terminal
    return webbrowser.open(url)
