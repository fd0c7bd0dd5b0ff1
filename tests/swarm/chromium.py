"""Chromium without a window, spoken to through its DevTools protocol; what is tested with it is not here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

START_S = 60.0


class Tab:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """What the page's programs and the browser complained of."""

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            said = await self._socket.receive_json(timeout=START_S)
            if said.get("id") == number:
                return said.get("result", said)
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(said["params"])[:400])

    async def run(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        return (await self.ask("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until the expression is true."""
        async with asyncio.timeout(START_S):
            while not await self.run(script):  # noqa: ASYNC110 - the condition is in another program
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """A new Chromium that keeps everything in `folder`, and is gone afterwards."""
    assert PROGRAM is not None
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [PROGRAM, "--headless=new", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    nowhere = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, *root, "about:blank", stdout=nowhere, stderr=nowhere)
    try:
        async with aiohttp.ClientSession() as session, session.ws_connect(await _tab(folder, session)) as socket:
            tab = Tab(socket)
            for domain in ("Page", "Runtime", "Log"):
                await tab.ask(f"{domain}.enable")
            yield tab
    finally:
        process.terminate()
        await process.wait()


async def _tab(folder: Path, session: aiohttp.ClientSession) -> str:
    """Address of the first tab's socket, once there is one."""
    async with asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(OSError, ValueError, IndexError, StopIteration, aiohttp.ClientError):
                port = int((folder / "DevToolsActivePort").read_text().splitlines()[0])
                async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                    return next(str(tab["webSocketDebuggerUrl"]) for tab in await reply.json() if tab["type"] == "page")
            await asyncio.sleep(0.1)
