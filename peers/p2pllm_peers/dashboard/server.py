"""The page's web server: its three files, what it begins with, what is new as server-sent events, and its buttons.

What does not live here: who may ask (`guard`), what is shown (`feed`), and what a button does (`steering`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from aiohttp import web

from p2pllm.errors import P2PLLMError, UsageError
from p2pllm.settings import PeerSettings, load_settings
from p2pllm.settings_file import LIVE
from p2pllm_peers import steering
from p2pllm_peers.dashboard.feed import POLL_S, Feed, Page, packed
from p2pllm_peers.dashboard.guard import Guard, add_headers
from p2pllm_peers.flags import kept
from p2pllm_peers.folders import PeerFolder
from p2pllm_peers.housekeeping import run_name

KEEP_ALIVE_S = 15.0

MAX_PAGES = 256
"""Open pages; a public one could be opened by anybody any number of times."""

MAX_REQUEST_BYTES = 16 * 1024
MAX_PAUSE_S = 366 * 86400.0

_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}

Peers = Callable[[], Sequence[PeerFolder]]


class Dashboard:
    """What the routes answer. peers: those that can be shown now, the one to begin with first."""

    def __init__(self, peers: Peers, home: Path | None = None, public: bool = False, poll_s: float = POLL_S) -> None:
        self.guard = Guard(public)
        self._peers = peers
        self._home = home
        self._poll_s = poll_s
        self._feeds: dict[PeerFolder, Feed] = {}
        self._pages = 0
        self._streams = set[asyncio.Task[Any]]()

    def app(self) -> web.Application:
        """The application, for any server."""
        app = web.Application(middlewares=[self.guard.middleware, _sentences], client_max_size=MAX_REQUEST_BYTES)
        app.on_response_prepare.append(add_headers)
        app.on_shutdown.append(self._end_streams)
        app.router.add_get("/api/start", self._start)
        app.router.add_get("/api/events", self._events)
        app.router.add_post("/api/pause", self._pause)
        app.router.add_post("/api/resume", self._resume)
        app.router.add_post("/api/set", self._set)
        for path in _FILES:
            app.router.add_get(path, self._static)
        return app

    async def _static(self, request: web.Request) -> web.StreamResponse:
        entry = self.guard.entry(request)
        if entry is not None:
            return entry
        name, kind = _FILES[request.path]
        content = (resources.files("p2pllm_peers.dashboard") / "static" / name).read_text(encoding="utf-8")
        return web.Response(text=content, content_type=kind, charset="utf-8")

    async def _chosen(self, request: web.Request) -> tuple[list[PeerFolder], PeerFolder]:
        """The peers that can be shown, and the one that is meant. Raises UsageError if there is none such."""
        try:
            peers = list(await asyncio.to_thread(self._peers))
        except UsageError:  # there is none any more; whose sentence names folders, which a public page does not
            peers = []
        wanted = request.query.get("peer")
        for peer in peers:
            if wanted in (None, peer_key(peer)):
                return peers, peer
        raise UsageError(
            f"This machine has no peer {wanted} any more." if wanted else "This machine has no peer any more."
        )

    def _feed(self, peer: PeerFolder) -> Feed:
        if peer not in self._feeds:
            self._feeds[peer] = Feed(peer, partial(changeable, peer), self.guard.public, self._poll_s)
        return self._feeds[peer]

    async def _start(self, request: web.Request) -> web.StreamResponse:
        peers, shown = await self._chosen(request)
        rest = await self._feed(shown).start()
        answer = {
            "public": self.guard.public,
            "now": round(time.time(), 3),
            "peers": [_described(peer) for peer in peers],
            "shown": peer_key(shown),
            **rest,
        }
        return web.json_response(answer, dumps=packed)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """What is new. `after` in the address, or Last-Event-ID of a browser that comes back: the last round it has."""
        _, shown = await self._chosen(request)
        if self._pages >= MAX_PAGES:
            raise web.HTTPServiceUnavailable(text="Too many pages are open; try again later.")
        after = request.headers.get("Last-Event-ID") or request.query.get("after", "")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a handler runs in one
        feed = self._feed(shown)
        page = feed.open(int(after) if after.isdecimal() and len(after) < 16 else None)
        self._pages += 1
        self._streams.add(task)
        try:
            await response.prepare(request)
            await _stream(feed, page, response)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the page was closed, or the server ends
        finally:
            self._streams.discard(task)
            self._pages -= 1
            feed.close(page)
        return response

    async def _end_streams(self, _: web.Application) -> None:
        for task in list(self._streams):
            task.cancel()

    async def _pause(self, request: web.Request) -> web.StreamResponse:
        seconds = (await _body(request)).get("seconds")
        is_time = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds <= MAX_PAUSE_S
        if seconds is not None and not is_time:
            raise UsageError("A pause lasts a number of seconds above 0, up to a year; null: until it is ended.")
        _, peer = await self._chosen(request)
        await asyncio.to_thread(steering.pause, peer, seconds)
        await self._feed(peer).look()
        return _done(f"'{peer.name}' pauses.")

    async def _resume(self, request: web.Request) -> web.StreamResponse:
        await _body(request)
        _, peer = await self._chosen(request)
        reason = await asyncio.to_thread(steering.resume, peer)
        await self._feed(peer).look()
        return _done(f"'{peer.name}' goes on{f' later; for now it pauses: {reason}' if reason else ''}.")

    async def _set(self, request: web.Request) -> web.StreamResponse:
        values = (await _body(request)).get("values")
        if not isinstance(values, dict) or not values or not all(isinstance(value, str) for value in values.values()):
            raise UsageError("Settings are sent as {'values': {name: text}}.")
        if foreign := sorted(set(values) - LIVE):
            raise UsageError(f"'{foreign[0]}' cannot be changed here; use `p2pllm set`.")
        changed = await asyncio.to_thread(steering.change, values, self._home)
        told, notes = await asyncio.to_thread(steering.tell_running, changed, self._home)
        _, peer = await self._chosen(request)
        await self._feed(peer).look()
        later = dict.fromkeys(sentence for sentences in told.values() for sentence in sentences)
        note = f"{', '.join(changed)} saved; {len(told)} running peers go by it now."
        return _done(" ".join([note, *(f"But {sentence}" for sentence in later), *notes]))


async def _stream(feed: Feed, page: Page, response: web.StreamResponse) -> None:
    """Write what is new for good; waits for a slow reader, and takes then what is newest."""
    while True:
        news = await page.news(KEEP_ALIVE_S)
        lines = []
        for event, data in news.items():
            last = f"id: {data['round'][-1]}\n" if event == "rounds" else ""
            lines.append(f"{last}event: {event}\ndata: {feed.text(event, data)}\n\n")
        await response.write("".join(lines or [": still here\n\n"]).encode())


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        found = await request.json()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError("What was sent is no JSON object.")
    return found


@web.middleware
async def _sentences(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """Foreseen errors are a sentence for the page."""
    try:
        answer: web.StreamResponse = await handler(request)
    except P2PLLMError as error:
        return web.json_response({"error": str(error)}, status=400)
    return answer


def _done(note: str) -> web.Response:
    return web.json_response({"ok": True, "note": note})


def peer_key(peer: PeerFolder) -> str:
    """What a peer is called in addresses."""
    return f"{peer.run.run_id[:16]}/{peer.name}"


def _described(peer: PeerFolder) -> dict[str, str]:
    run_id = peer.run.run_id[:16]
    return {"id": peer_key(peer), "run_name": run_name(peer.run) or "", "run_id": run_id, "name": peer.name}


def changeable(peer: PeerFolder) -> list[dict[str, Any]]:
    """The settings of a peer that a page can change, as they are now; none if the file is not valid at the moment."""
    try:
        settings = load_settings(**kept(peer))
    except P2PLLMError:
        return []
    found = []
    for name, field in PeerSettings.model_fields.items():
        if name in LIVE:
            value = getattr(settings, name)
            kind = "bool" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"
            found.append({"name": name, "value": value, "kind": kind, "unit_and_meaning": field.description})
    return found
