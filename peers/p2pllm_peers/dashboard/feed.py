"""Feed: what pages show of one peer, asked from its daemon and read from its files once a second for all of them.

Nothing is asked or read while no page is open. What does not live here: HTTP (`server`), columns (`history`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from p2pllm.errors import DaemonError
from p2pllm_peers.control import ask
from p2pllm_peers.dashboard.credits import CreditBook
from p2pllm_peers.dashboard.history import THINNED, WHOLE, Columns, History, Row, columns
from p2pllm_peers.exporter import RecordFile
from p2pllm_peers.folders import PeerFolder

log = logging.getLogger(__name__)

POLL_S = 1.0

LINKS_S = 5.0
"""How often a daemon is asked for the map of links."""

ANSWER_S = 3.0
"""How long a daemon may take to answer."""

_AGAIN = 10
"""Rounds that a page gets again when it opens its events."""

_SHOWN = (
    "run_name",
    "name",
    "peer_id",
    "phase",
    "trouble",
    "notice",
    "paused",
    "round",
    "rounds",
    "samples",
    "gathered",
    "wanted",
    "credit",
    "seconds",
    "loss",
    "validation_loss",
    "tokens_per_s",
    "swarm_tokens_per_s",
    "bytes_sent",
    "bytes_received",
    "device",
    "micro_batch",
    "worker_restarts",
)
"""What a page gets of a status, and shows: neither invite nor addresses."""

_SHOWN_OF_PEERS = ("peer", "phase", "round", "samples")

_NO_LINKS: dict[str, list[Any]] = {"peers": [], "pairs": []}

_PRIVATE = {"trouble": "", "notice": "", "paused": ""}
"""What a public page shows instead of sentences that may name folders."""

Status = dict[str, Any]
Settings = Callable[[], list[dict[str, Any]]]


class Page:
    """What one open page has not got yet: the newest of everything, and the rounds that were added.

    A page that takes it slowly misses statuses, but no round, unless more came than any page holds.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._rows: list[Row] = []
        self._has_news = asyncio.Event()

    def put(self, event: str, data: Any) -> None:
        """Have something told; it takes the place of what waits under the same name."""
        self._latest[event] = data
        self._has_news.set()

    def add(self, rows: list[Row]) -> None:
        """Have new rounds told."""
        self._rows = [*self._rows, *rows][-(WHOLE + THINNED) :]
        self._has_news.set()

    async def news(self, timeout: float) -> dict[str, Any]:
        """Event -> data of what is new; empty after `timeout` seconds of nothing. Rounds come as columns."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._has_news.wait()
        self._has_news.clear()
        found, self._latest = self._latest, {}
        rows, self._rows = self._rows, []
        return found | ({"rounds": columns(rows)} if rows else {})


class Feed:
    """One peer for all pages that show it."""

    def __init__(self, peer: PeerFolder, settings: Settings, public: bool = False, poll_s: float = POLL_S) -> None:
        self._peer = peer
        self._settings = settings
        self._public = public
        self._poll_s = poll_s
        self._pages = set[Page]()
        self._polling: asyncio.Task[None] | None = None
        self._at_work, self._opening = asyncio.Lock(), asyncio.Lock()
        self._file = RecordFile(peer.path / "rounds.jsonl", self._on_anew)
        self._history = History()
        self._is_anew = False
        self._looked = float("-inf")
        self._book = CreditBook(peer)
        self._uncounted = True  # there may be rounds that the book has not counted
        self._known: dict[str, Any] = {"status": None, "credits": [], "links": _NO_LINKS, "settings": []}
        self._texts: dict[str, tuple[Any, str]] = {}
        self._links_at = float("-inf")

    async def start(self) -> dict[str, Any]:
        """All that a page begins with."""
        async with self._opening:
            if time.monotonic() - self._looked >= self._poll_s:  # so that opening pages asks no daemon more often
                await self.look()
        return {**self._known, "rounds": self.rounds()}

    def rounds(self) -> Columns:
        """The rounds that a page begins with."""
        return columns(self._history.rows())

    def text(self, event: str, data: Any) -> str:
        """What a page is sent of an event; made once for all pages."""
        made = self._texts.get(event)
        if made is None or made[0] is not data:
            made = self._texts[event] = (data, packed(data))
        return made[1]

    def open(self, after: int | None = None) -> Page:
        """A page that is told from now on, beginning with how things are.

        after: the last round that it has. A page that does not say so gets the newest few again: some may have been
        added after its `start`.
        """
        page = Page()
        for event, data in self._known.items():
            page.put(event, data)
        rows = self._history.rows()[-_AGAIN:] if after is None else self._history.rows(after)
        if rows:
            page.add(rows)
        self._pages.add(page)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        return page

    def close(self, page: Page) -> None:
        """A page is gone; with the last one the polling ends, after the look that is under way."""
        self._pages.discard(page)

    async def _poll(self) -> None:
        while self._pages:  # never cancelled: rounds that a thread has read for a look come only once
            try:
                await self.look()
            except Exception:
                log.exception("a look at %s failed; the page goes on with the next", self._peer.path)
            await asyncio.sleep(self._poll_s)

    async def look(self) -> None:
        """Ask and read once, and tell all pages what is new."""
        async with self._at_work:
            status, rows = await asyncio.gather(asyncio.to_thread(self._ask), asyncio.to_thread(self._read))
            self._looked = time.monotonic()
            if self._is_anew:
                self._is_anew = False
                self._history.clear()
            for row in rows:
                self._history.add(row)
            if rows:
                self._uncounted = True
                for page in self._pages:
                    page.add(rows)
            self._tell("status", status)
            if self._looked - self._links_at >= min(LINKS_S, 5 * self._poll_s):
                self._links_at = self._looked
                self._tell("links", await asyncio.to_thread(self._ask_links))
            if self._uncounted and self._book.is_due:
                self._uncounted = False
                await asyncio.to_thread(self._book.update)
                self._tell("credits", self._book.rows)
            if not self._public:
                self._tell("settings", await asyncio.to_thread(self._settings))

    def _tell(self, event: str, data: Any) -> None:
        if self._known[event] != data:
            self._known[event] = data
            for page in self._pages:
                page.put(event, data)

    def _ask(self) -> Status | None:
        """The daemon's status; None if it does not run or answer, which may change at any time."""
        status = self._answer("status")
        if "round" not in status:
            return None  # an error, or a daemon that ends
        shown = {name: status[name] for name in _SHOWN if name in status} | {"peers": _peers(status)}
        return shown | _PRIVATE if self._public else shown

    def _ask_links(self) -> dict[str, list[Any]]:
        """Who exchanges how fast with whom, as `linkmap.LinkMap.look` tells it."""
        found = self._answer("links")
        return found if "pairs" in found else _NO_LINKS

    def _answer(self, what: str) -> dict[str, Any]:
        running = self._peer.running()
        try:
            return ask(running["socket"], {"do": what}, ANSWER_S) if running else {}
        except DaemonError:
            return {}

    def _read(self) -> list[Row]:
        try:
            return [Row.of(record) for record in self._file.news()]
        except OSError:
            return []  # comes the next time

    def _on_anew(self) -> None:
        self._is_anew = True


def _peers(status: Status) -> list[dict[str, Any]]:
    """The others as a page shows them, every second and for all of a large swarm: nothing that it does not use."""
    return [
        {name: peer[name] for name in _SHOWN_OF_PEERS} | {"tokens_per_s": round(peer["tokens_per_s"])}
        for peer in status["peers"]
    ]


def packed(data: Any) -> str:
    """As JSON, which knows no NaN: a loss that is none is null."""
    try:
        return json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), separators=(",", ":"))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data
