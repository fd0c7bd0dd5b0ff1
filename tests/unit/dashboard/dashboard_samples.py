"""A machine with a peer whose daemon is a fake behind a real control socket, and a real server beside it."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientResponse, ClientSession, web
from yarl import URL

from p2pllm.metrics import RoundRecord
from p2pllm_peers.control import ControlServer
from p2pllm_peers.dashboard.server import Dashboard
from p2pllm_peers.dashboard.serving import listen
from p2pllm_peers.folders import PeerFolder, RunFolder

RUN_ID = "3d69353726da86d9"
POLL_S = 0.02
LIMIT_S = 20.0


def peer_id(number: int) -> str:
    """As long as a real one."""
    return f"12D3KooW{number:044d}"


def status(members: int = 2, **changes: Any) -> dict[str, Any]:
    """What a daemon that sees `members` - 1 others answers."""
    seen = {"phase": "collecting", "round": 5, "samples": 1234, "tokens_per_s": 6489.5, "record": "8e" * 32}
    return {
        "run_name": "stdlib-llama",
        "run_id": RUN_ID,
        "name": "founder",
        "peer_id": peer_id(0),
        "invite": "p2pllm:secret",
        "phase": "collecting",
        "trouble": "cannot write /home/someone/p2pllm",
        "paused": "",
        "round": 5,
        "limits": {"cpu_percent": 50.0},
        "losses": [2.5] * 200,
        "peers": [{"peer": peer_id(number), **seen} for number in range(1, members)],
        **changes,
    }


def record(round_: int, members: int = 2, validation_loss: float | None = None) -> RoundRecord:
    """A committed round."""
    return RoundRecord(
        round=round_,
        unix_time=1_795_395_655.99365 + 2.123456 * round_,
        samples=400,
        tokens=51_200,
        members={peer_id(number): 400 // members for number in range(members)},
        loss=2.123456789 + 1 / round_,
        validation_loss=validation_loss,
        learning_rate=3e-3,
        record_digest="90" * 32,
        aggregate_digest="a8" * 32,
        state_digest="bc" * 32,
        attempts=1,
        own_steps=[4] * 2,
        bytes_sent=352_140_123,
        bytes_received=352_002_123,
        seconds={"compute": 1.0, "exchange": 0.251234, "outer_step": 0.1, "digest": 0.2, "store": 0.03, "log": 0.004},
        round_s=1.5,
    )


def links(members: int, shift: float = 0.0) -> dict[str, Any]:
    """What a daemon answers that knows the links of so many."""
    pairs = [[one, two, round(97.5 + shift + one, 1), 2] for one in range(members) for two in range(one + 1, members)]
    return {"peers": [peer_id(number) for number in range(members)], "pairs": pairs}


class FakeDaemon:
    """A peer whose daemon answers `status` with whatever `reply` is, and remembers what it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peer: PeerFolder = RunFolder(folder / "home", RUN_ID).peer("founder")
        os.close(self.peer.lock())
        (self.peer.run.path / "manifest.json").write_text("{}")
        self.reply = status()
        self.links = links(2)
        self.asked = 0
        self.told: list[dict[str, Any]] = []
        self._server: ControlServer | None = None
        self._handle = -1

    async def start(self) -> None:
        """Live: hold the lock, and answer."""
        self._handle = self.peer.lock()
        socket = self.folder / "control"
        orders = dict.fromkeys(("pause", "resume", "set"), self._order)
        self._server = ControlServer(socket, {"status": self._status, "links": self._links, **orders})
        await self._server.start()
        (self.peer.path / "daemon.json").write_text(json.dumps({"socket": str(socket)}))

    async def stop(self) -> None:
        """Die."""
        if self._server is not None:
            await self._server.close()
            os.close(self._handle)
            self._server = None

    async def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        return self.reply

    async def _links(self, _: dict[str, Any]) -> dict[str, Any]:
        return self.links

    async def _order(self, request: dict[str, Any]) -> dict[str, Any]:
        self.told.append(request)
        if request.get("seconds") == 13:
            return {"error": "not on a thirteenth."}
        return {"paused": ""}

    def append(self, *records: RoundRecord, end: str = "") -> None:
        """Commit rounds; `end` is what a writer has got of the next line."""
        with (self.peer.path / "rounds.jsonl").open("a") as file:
            file.write("".join(record.to_json() + "\n" for record in records) + end)


@asynccontextmanager
async def page_of(daemon: FakeDaemon, public: bool = False) -> AsyncIterator[Visitor]:
    """The server on a free port, and a browser that has opened the printed address."""
    dashboard = Dashboard(lambda: [daemon.peer], daemon.folder / "home", public, POLL_S)
    runner = web.AppRunner(dashboard.app(), shutdown_timeout=0.1)
    await runner.setup()
    try:
        url = await listen(dashboard, runner, "127.0.0.1", 0)
        async with ClientSession() as session:
            yield Visitor(session, url, dashboard)
    finally:
        await runner.cleanup()


class Visitor:
    """A browser without a cookie jar that forgets: each request says what it sends."""

    def __init__(self, session: ClientSession, url: str, dashboard: Dashboard) -> None:
        self.session, self.url, self.dashboard = session, URL(url), dashboard
        self.origin = str(self.url.origin())
        guard = dashboard.guard
        self.cookie = {"Cookie": f"{guard.cookie}={guard.token}"}

    async def get(self, path: str, **headers: str) -> ClientResponse:
        """As the page itself asks, but for `headers` (a name's underscores are hyphens)."""
        return await self._request("GET", path, self.cookie | _named(headers))

    async def post(self, path: str, data: Any, **headers: str) -> ClientResponse:
        """As the page itself sends, but for `headers`; an empty one is not sent."""
        usual = {**self.cookie, "Origin": self.origin, "Content-Type": "application/json"} | _named(headers)
        return await self._request("POST", path, usual, json.dumps(data))

    async def _request(
        self, method: str, path: str, headers: dict[str, str], data: str | None = None
    ) -> ClientResponse:
        given = {name: value for name, value in headers.items() if value}
        response = await self.session.request(
            method, self.origin + path, headers=given, data=data, allow_redirects=False
        )
        await response.read()
        return response

    async def start(self, path: str = "/api/start") -> dict[str, Any]:
        """What the page begins with."""
        found: dict[str, Any] = await (await self.get(path)).json()
        return found

    def events(self, query: str = "", **headers: str) -> Any:
        """The open stream of events, as a context."""
        return self.session.get(f"{self.origin}/api/events{query}", headers=self.cookie | _named(headers))


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


async def next_event(response: ClientResponse, name: str) -> Any:
    """Data of the next event of this name."""
    async for line in response.content:
        if line == f"event: {name}\n".encode():
            return json.loads((await response.content.readline()).removeprefix(b"data: "))
    raise AssertionError(f"the stream ended before an event {name}")
