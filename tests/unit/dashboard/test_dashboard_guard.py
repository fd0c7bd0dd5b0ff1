"""Who gets in, and who may change anything."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from dashboard_samples import FakeDaemon, Visitor, page_of

from p2pllm.errors import UsageError
from p2pllm_cli.main import cli
from p2pllm_peers.dashboard.server import Dashboard
from p2pllm_peers.folders import PeerFolder, RunFolder


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path)
    await daemon.start()
    yield daemon
    await daemon.stop()


@pytest.fixture
async def visitor(daemon: FakeDaemon) -> AsyncIterator[Visitor]:
    async with page_of(daemon) as visitor:
        yield visitor


async def test_the_printed_address_gives_a_cookie_and_goes_on_without_the_token(visitor: Visitor) -> None:
    response = await visitor.get(str(visitor.url.relative()), Cookie="")
    assert (response.status, response.headers["Location"]) == (303, "/")
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
    (pair, *_) = cookie.split(";")
    assert (await visitor.get("/api/start", Cookie=pair)).status == 200


@pytest.mark.parametrize("path", ["/", "/app.js", "/style.css", "/api/start", "/api/events", "/nothing"])
async def test_nothing_is_shown_without_the_token(visitor: Visitor, path: str) -> None:
    wrong = visitor.cookie["Cookie"][:-1] + "~"
    for cookie in ("", wrong, "ä=ö"):
        response = await visitor.get(path, Cookie=cookie)
        assert response.status == 401 and "founder" not in await response.text()
    assert (await visitor.get(f"{path}?token=wrong", Cookie="")).status == 401


async def test_another_name_for_this_machine_is_refused(visitor: Visitor) -> None:
    port = visitor.url.port
    for host in (f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.evil.example:{port}", ""):
        headers = {"Host": host} if host else {"Host": " "}
        assert (await visitor.get("/api/start", **headers)).status in (400, 403), host
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert (await visitor.get("/api/start", Host=host)).status == 200, host


async def test_another_site_cannot_read(visitor: Visitor) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        response = await visitor.get("/api/start", Origin=origin)
        assert response.status == 403 and "Access-Control-Allow-Origin" not in response.headers


async def test_changes_come_from_the_page_alone(visitor: Visitor, daemon: FakeDaemon) -> None:
    refused = [
        {"Origin": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Cookie": ""},
        {"Host": "evil.example"},
    ]
    for path in ("/api/pause", "/api/resume", "/api/set"):
        for headers in refused:
            response = await visitor.post(path, {}, **headers)
            assert response.status in (401, 403, 415), (path, headers)
            assert (await response.json())["error"].endswith(".")
        assert (await visitor.get(path)).status == 405
    assert daemon.told == []
    assert (await visitor.post("/api/pause", {"seconds": 60}, Sec_Fetch_Site="same-origin")).status == 200
    assert daemon.told == [{"do": "pause", "seconds": 60}]


async def test_all_answers_say_what_a_page_may_do(visitor: Visitor) -> None:
    for path, cookie in (("/api/start", None), ("/api/start", ""), ("/nothing", None)):
        response = await visitor.get(path, **({} if cookie is None else {"Cookie": cookie}))
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["Cache-Control"] == "no-store"


async def test_a_public_page_is_read_by_all_and_changed_by_nobody(daemon: FakeDaemon) -> None:
    async with page_of(daemon, public=True) as visitor:
        assert "token" not in str(visitor.url)
        response = await visitor.get("/api/start", Cookie="", Host="swarm.example")
        found = await response.json()
        assert found["public"] is True and found["status"]["round"] == 5
        assert found["settings"] == [] and "limits" not in found["status"]
        text = await response.text()
        assert "secret" not in text and "/home/" not in text and str(daemon.folder) not in text
        for path in ("/api/pause", "/api/resume", "/api/set"):
            assert (await visitor.post(path, {"seconds": 60})).status == 403
        assert daemon.told == []


async def test_errors_are_a_sentence(visitor: Visitor, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PLLM_CONFIG", str(daemon.folder / "config"))
    for path, body in [
        ("/api/pause", {"seconds": "long"}),
        ("/api/pause", {"seconds": -1}),
        ("/api/pause", {"seconds": True}),
        ("/api/pause", {"seconds": 13}),
        ("/api/pause", []),
        ("/api/pause?peer=none", {}),
        ("/api/set", {}),
        ("/api/set", {"values": {"cpu_percent": "a lot"}}),
        ("/api/set", {"values": {"cpu_percent": 5}}),
        ("/api/set", {"values": {"home": "/"}}),
    ]:
        response = await visitor.post(path, body)
        assert response.status == 400 and (await response.json())["error"].endswith("."), (path, body)
    assert not (daemon.folder / "config").exists()
    nested = await visitor.session.post(
        f"{visitor.origin}/api/pause",
        headers=visitor.cookie | {"Origin": visitor.origin, "Content-Type": "application/json"},
        data="[" * 16_000,
    )
    assert nested.status == 400 and "no JSON object" in (await nested.json())["error"]
    await daemon.stop()
    response = await visitor.post("/api/resume", {})
    assert response.status == 400 and "not running" in (await response.json())["error"]


async def test_settings_go_to_the_file_and_to_running_peers(
    visitor: Visitor, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PLLM_CONFIG", str(daemon.folder / "config"))
    response = await visitor.post("/api/set", {"values": {"cpu_percent": "50", "only_on_mains": "true"}})
    assert response.status == 200, await response.text()
    assert daemon.told == [{"do": "set", "values": {"cpu_percent": 50.0, "only_on_mains": True}}]
    assert "cpu_percent = 50.0" in (daemon.folder / "config" / "settings.toml").read_text()
    rows = {row["name"]: row for row in (await visitor.start())["settings"]}
    assert (rows["cpu_percent"]["value"], rows["cpu_percent"]["kind"]) == (50.0, "number")
    assert (rows["only_on_mains"]["value"], rows["hours"]["kind"]) == (True, "text")
    assert "home" not in rows


def test_the_command_listens_for_others_only_when_told(tmp_path: Path) -> None:
    for arguments, sentence in [
        (["--host", "0.0.0.0"], "--public"),
        (["--host", "192.0.2.1"], "--public"),
        (["--host", "my-machine"], "no IP address"),
        (["--home", str(tmp_path)], "no run yet"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            cli.main(["dashboard", *arguments], standalone_mode=False)


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[PeerFolder]:
    """The peers of the page that the command would serve, as they are when it asks."""
    found = list[Dashboard]()
    monkeypatch.setattr("p2pllm_peers.dashboard.serving.run", lambda dashboard, *_: found.append(dashboard))
    cli.main(["dashboard", *arguments], standalone_mode=False)
    return list(found[0]._peers())


def test_a_public_page_shows_one_peer_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = ["--home", str(tmp_path)]
    shown, other = (RunFolder(tmp_path, letter * 16) for letter in "ab")
    for peer in (shown.peer("founder"), shown.peer("volunteer")):
        os.close(peer.lock())
        (shown.path / "manifest.json").write_text("{}")
    assert served(monkeypatch, *home, "--public") == [shown.peer("founder")]
    os.close(other.peer("founder").lock())
    (other.path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=r"knows 2 runs; say with --run"):
        cli.main(["dashboard", "--public", *home], standalone_mode=False)
    assert served(monkeypatch, *home, "--public", "--run", "aa", "--name", "volunteer") == [shown.peer("volunteer")]
    assert len(served(monkeypatch, *home)) == 3


def test_a_browser_is_started_without_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.close(RunFolder(tmp_path, "a" * 16).peer("founder").lock())
    (tmp_path / "runs" / ("a" * 16) / "manifest.json").write_text("{}")
    url = "http://127.0.0.1:1/?token=secret"
    opened = list[str]()

    def run(dashboard: Dashboard, host: str, port: int, ready: Callable[[str], None]) -> None:
        ready(url)
        door = Path(unquote(urlsplit(opened[-1]).path))
        if "secret" not in opened[-1]:
            assert url in door.read_text() and stat.S_IMODE(door.stat().st_mode) == 0o600

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("p2pllm_peers.dashboard.serving.run", run)
    monkeypatch.setattr("webbrowser.open", opened.append)
    cli.main(["dashboard", "--home", str(tmp_path)], standalone_mode=False)
    assert len(opened) == 1 and opened[0].startswith("file:///") and "secret" not in opened[0]
    assert not Path(unquote(urlsplit(opened[0]).path)).exists()
    cli.main(["dashboard", "--home", str(tmp_path), "--public"], standalone_mode=False)
    assert opened[1] == url


async def test_a_public_page_without_peers_names_no_folder(daemon: FakeDaemon) -> None:
    def nobody() -> list[PeerFolder]:
        raise UsageError(f"There is none in {daemon.folder}.")

    async with page_of(daemon, public=True) as visitor:
        visitor.dashboard._peers = nobody
        response = await visitor.get("/api/start")
        assert response.status == 400 and str(daemon.folder) not in await response.text()
