"""The page of a real peer: what it shows, and its buttons."""

from __future__ import annotations

import asyncio
import http.cookiejar
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import PROGRAM, Tab, browser
from polling import until

from p2pllm_peers.dashboard.serving import door

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]


SAID = "document.getElementById('said-words').textContent"
ROUND = "document.getElementById('progress-text').textContent"
TOO_WIDE = """[...document.querySelectorAll("h1, p, dt, dd, li, button, label > *, text")]
    .filter((one) => one.getBoundingClientRect().right > innerWidth || one.getBoundingClientRect().left < 0)
    .map((one) => one.textContent)"""


class Browser:
    """Opens the printed address once, and has the cookie from then on."""

    def __init__(self, url: str) -> None:
        self.origin = url.partition("/?")[0]
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self._opener = urllib.request.build_opener(jar)
        self.html = self._opener.open(url, timeout=20).read().decode()

    def start(self) -> dict[str, Any]:
        return json.loads(self._opener.open(self.origin + "/api/start", timeout=20).read())

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Origin": self.origin}
        request = urllib.request.Request(self.origin + path, json.dumps(body).encode(), headers)  # noqa: S310
        return json.loads(self._opener.open(request, timeout=20).read())


@pytest.fixture(scope="module")
def shown(make_peer_env: Callable[[], Any]) -> Iterator[tuple[Any, str]]:
    """A founder in the background, and the address of its page."""
    env = make_peer_env()
    started = env.p2pllm("start", env.write_run(), "--detach")
    assert started.returncode == 0, started.stderr
    command = [sys.executable, "-u", "-m", "p2pllm_cli.main", "dashboard", "--no-open"]
    page = subprocess.Popen(command, env=env.variables, cwd=env.folder, stdout=subprocess.PIPE, text=True)
    try:
        assert page.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", page.stdout.readline())
        assert found is not None
        yield env, found[0]
        os.kill(page.pid, signal.SIGINT)
        assert page.wait(20) == 0
    finally:
        page.kill()
        page.wait()
        page.stdout.close()
        if _status(env)["phase"] != "stopped":
            env.p2pllm("leave")


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")
async def test_a_click_changes_the_daemon_and_says_so(shown: tuple[Any, str], tmp_path: Path) -> None:
    env, url = shown
    async with browser(tmp_path) as tab:
        await opened(tab, url, tmp_path)
        await tab.until("document.querySelectorAll('#rounds rect').length > 2")
        assert await tab.run("document.querySelectorAll('#peers tr').length") == 1
        for button, phase, words in (("pause", "paused", "pauses"), ("resume", "collecting", "goes on")):
            await tab.run(f"document.getElementById('{button}').click()")
            await asyncio.to_thread(until, lambda phase=phase: _status(env)["phase"] == phase, f"it is {phase}")
            await tab.until(f"{SAID}.includes('{words}')")
        await tab.run("document.getElementById('said-away').click()")
        assert await tab.run("document.getElementById('said').hidden")
        await tab.run(save("cpu_percent", "60"))
        await tab.until(f"{SAID}.startsWith('cpu_percent saved')")
        assert _status(env)["limits"]["cpu_percent"] == 60
        await tab.run(save("cpu_percent", "700"))
        await tab.until(f"{SAID}.includes('100')")
        round_ = await tab.run(ROUND)
        await tab.until(f"{ROUND} !== {json.dumps(round_)}")  # what tells of the daemon was drawn again
        assert "100" in await tab.run(SAID)
        assert _status(env)["limits"]["cpu_percent"] == 60
        assert [line for line in tab.complaints if "400 (Bad Request)" not in line] == []


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
async def test_it_fits_every_screen(shown: tuple[Any, str], tmp_path: Path, scheme: str, width: int) -> None:
    async with browser(tmp_path) as tab:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await tab.ask("Emulation.setDeviceMetricsOverride", **screen)
        await tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await opened(tab, shown[1], tmp_path)
        await tab.until("document.querySelectorAll('#rounds rect').length > 2")
        await tab.until("document.querySelector('#settings input') !== null")
        assert await tab.run("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
        assert await tab.run(TOO_WIDE) == []
        light = await tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 127")
        assert light == (scheme == "light")
        assert tab.complaints == []


def save(name: str, value: str) -> str:
    """Type a setting and press its button."""
    return f"""for (const label of document.querySelectorAll("#settings label")) {{
        if (label.firstChild.textContent !== "{name}") continue;
        label.querySelector("input").value = "{value}";
        label.querySelector("button").click();
    }}"""


async def opened(tab: Tab, url: str, folder: Path) -> None:
    """As `p2pllm dashboard` opens it: by a file that leads to the printed address."""
    with door(url, folder) as path:
        await tab.ask("Page.navigate", url=path.as_uri())
        await tab.until("document.getElementById('connection')?.textContent === 'live'")
    assert "token" not in await tab.run("location.href")


def test_the_page_shows_a_peer_and_pauses_it(shown: tuple[Any, str]) -> None:
    env, url = shown
    page = Browser(url)
    assert "<script" in page.html and "/app.js" in page.html
    seen = until(lambda: len((found := page.start())["rounds"]["round"]) > 2 and found, "rounds are shown")
    assert seen["status"]["name"] == "founder"
    until(lambda: page.start()["credits"], "credits are shown")
    assert page.start()["credits"][0]["share"] == 1.0
    assert page.post("/api/pause", {"seconds": 3600})["ok"] is True
    until(lambda: _status(env)["phase"] == "paused", "it pauses")
    assert _status(env)["paused"].startswith("until ")
    page.post("/api/resume", {})
    until(lambda: not _status(env)["paused"], "it goes on")
    assert env.p2pllm("leave").returncode == 0
    until(lambda: page.start()["status"] is None, "the page outlives the daemon")


def _status(env: Any) -> dict[str, Any]:
    return json.loads(env.p2pllm("status", "--json").stdout.splitlines()[0])
