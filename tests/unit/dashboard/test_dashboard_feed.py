"""What pages are told, and what that costs the daemon."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from dashboard_samples import LIMIT_S, POLL_S, FakeDaemon, links, next_event, page_of, peer_id, record, status

from p2pllm_peers.dashboard.credits import PAUSE_S
from p2pllm_peers.dashboard.feed import LINKS_S, Feed, Page
from p2pllm_peers.dashboard.feed import POLL_S as POLL_EVERY_S
from p2pllm_peers.dashboard.history import PARTS, THINNED, WHOLE, Row
from p2pllm_peers.dashboard.server import changeable
from p2pllm_peers.flags import keep


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path)
    await daemon.start()
    yield daemon
    await daemon.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - the daemon is another party
            await asyncio.sleep(0.005)


async def test_a_page_begins_with_all_there_is(daemon: FakeDaemon) -> None:
    daemon.append(record(1), record(2, 4, validation_loss=2.5), end='{"round": 3, "un')
    async with page_of(daemon) as visitor:
        found = await visitor.start()
    assert found["shown"] == found["peers"][0]["id"] == "3d69353726da86d9/founder"
    assert found["status"]["peers"][0]["peer"] == peer_id(1)
    assert not {"invite", "losses"} & set(found["status"])
    rounds = found["rounds"]
    assert (rounds["round"], rounds["members"], rounds["validation_loss"]) == ([1, 2], [2, 4], [None, 2.5])
    assert rounds["parts"]["apply"] == [0.334, 0.334] and set(rounds["parts"]) == set(PARTS)


async def test_a_peer_that_is_not_there_is_refused(daemon: FakeDaemon) -> None:
    async with page_of(daemon) as visitor:
        for path in ("/api/start?peer=none", "/api/events?peer=../../etc"):
            response = await visitor.get(path)
            assert response.status == 400 and "no peer" in (await response.json())["error"]


async def test_events_tell_what_is_new_and_survive_a_restart_of_the_daemon(daemon: FakeDaemon) -> None:
    daemon.append(record(1))
    async with page_of(daemon) as visitor, asyncio.timeout(LIMIT_S), visitor.events() as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        assert await next_event(stream, "status") is None  # nobody has looked yet
        daemon.append(record(2), end='{"half')
        while (rounds := (await next_event(stream, "rounds"))["round"])[-1] != 2:
            assert rounds == [1]
        daemon.reply = status(phase="exchange")
        while (await next_event(stream, "status") or {}).get("phase") != "exchange":
            pass
        await daemon.stop()
        while await next_event(stream, "status") is not None:
            pass
        daemon.reply = status(round=6)
        await daemon.start()
        while (await next_event(stream, "status") or {}).get("round") != 6:
            pass
        daemon.append(end='"\n')
        daemon.append(record(3))
        assert (await next_event(stream, "rounds"))["round"] == [3]


async def test_a_browser_that_comes_back_gets_what_it_missed(daemon: FakeDaemon) -> None:
    daemon.append(*(record(round_) for round_ in range(1, 6)))
    async with page_of(daemon) as visitor, asyncio.timeout(LIMIT_S):
        await visitor.start()
        async with visitor.events("?after=1", Last_Event_ID="3") as stream:
            assert (await next_event(stream, "rounds"))["round"] == [4, 5]
        async with visitor.events() as stream:
            assert (await next_event(stream, "rounds"))["round"] == [1, 2, 3, 4, 5]
        async with visitor.events("?after=4") as stream:
            assert (await next_event(stream, "rounds"))["round"] == [5]


async def test_many_pages_cost_one_question_and_no_page_costs_none(daemon: FakeDaemon) -> None:
    feed = Feed(daemon.peer, list, poll_s=POLL_S)
    pages = [feed.open() for _ in range(50)]
    polls = 0
    look = feed.look

    async def counted() -> None:
        nonlocal polls
        polls += 1
        await look()

    feed.look = counted  # type: ignore[method-assign]
    await until(lambda: polls >= 5)
    assert daemon.asked <= polls
    for page in pages:
        feed.close(page)
    async with feed._at_work:  # what was under way has ended
        asked = daemon.asked
    await asyncio.sleep(5 * POLL_S)
    assert daemon.asked <= asked + 1  # a question that was on its way when the last page was closed


async def test_rounds_that_are_read_while_the_last_page_closes_are_not_lost(daemon: FakeDaemon) -> None:
    daemon.append(record(1))
    feed = Feed(daemon.peer, list, poll_s=POLL_S)
    may_answer, has_read = threading.Event(), threading.Event()
    ask, read = feed._ask, feed._read
    feed._ask = lambda: ask() if may_answer.wait(LIMIT_S) else None  # type: ignore[method-assign]
    feed._read = lambda: (read(), has_read.set())[0]  # type: ignore[method-assign]
    page = feed.open()
    await asyncio.to_thread(has_read.wait, LIMIT_S)
    feed.close(page)
    await asyncio.sleep(0)
    may_answer.set()
    assert (await feed.start())["rounds"]["round"] == [1]


async def test_a_slow_page_gets_the_newest_status_and_every_round() -> None:
    page = Page()
    for number in range(1000):
        page.put("status", {"round": number})
        page.add([Row.of(record(number + 1))])
    news = await page.news(1)
    assert news["status"] == {"round": 999}
    assert news["rounds"]["round"] == list(range(1, 1001))
    assert await page.news(0.01) == {}
    page.add([Row.of(record(number + 1)) for number in range(3 * (WHOLE + THINNED))])
    assert len((await page.news(1))["rounds"]["round"]) == WHOLE + THINNED


async def test_a_long_run_of_many_peers_stays_small(daemon: FakeDaemon) -> None:
    members = 64
    daemon.reply, daemon.links = status(members), links(members)
    line = record(1, members).to_json()
    with (daemon.peer.path / "rounds.jsonl").open("w") as file:
        file.writelines(line.replace('"round":1,', f'"round":{round_},') + "\n" for round_ in range(1, 5001))
    async with page_of(daemon) as visitor, asyncio.timeout(LIMIT_S):
        response = await visitor.get("/api/start")
        assert len(await response.read()) < 500_000
        assert len((await response.json())["links"]["pairs"]) == 64 * 63 // 2
        rounds = (await response.json())["rounds"]
        assert rounds["round"][-WHOLE:] == list(range(5001 - WHOLE, 5001))
        assert len(rounds["round"]) <= WHOLE + THINNED
        async with visitor.events(f"?after={rounds['round'][-1]}") as stream:
            await next_event(stream, "settings")  # the last of how things are
            daemon.reply = status(members, round=7)
            daemon.append(record(5001, members))
            told = b""
            while b'"round":[5001]' not in told or b'"round":7,' not in told:
                told += await stream.content.readline()
            assert len(told) < 20_000, "of a second"


async def test_a_page_of_many_peers_gets_little_in_a_second_even_if_all_changes(daemon: FakeDaemon) -> None:
    members = 64
    page = Page()
    feed = Feed(daemon.peer, partial(changeable, daemon.peer))
    feed._pages.add(page)
    feed._book.update = lambda: False  # type: ignore[method-assign]
    daemon.reply, daemon.links = status(members), links(members, shift=0.1)
    for seen in daemon.reply["peers"]:
        seen |= {"round": 4999, "samples": 123_456, "tokens_per_s": 123_456.789}
    feed._book.rows = [
        {"peer": peer_id(number), "samples": 123_456_789, "share": 0.0156, "rounds": 4999, "last": 4999}
        for number in range(members)
    ]
    daemon.append(record(4999, members))
    await feed.look()
    news = await page.news(LIMIT_S)
    every_s = {"status": POLL_EVERY_S, "rounds": POLL_EVERY_S, "links": LINKS_S, "credits": PAUSE_S}
    assert set(news) == {*every_s, "settings"}  # settings change when a person changes them
    bytes_a_second = sum(len(feed.text(event, news[event])) / seconds for event, seconds in every_s.items())
    assert bytes_a_second < 20_000


async def test_a_loss_that_is_no_number_is_null(daemon: FakeDaemon) -> None:
    daemon.append(record(1, validation_loss=float("nan")))
    daemon.reply["loss"] = float("inf")
    async with page_of(daemon) as visitor:
        found = await visitor.start()
    assert found["rounds"]["validation_loss"] == [None] and found["status"]["loss"] is None


async def test_a_look_that_fails_is_not_the_last(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = 0

    async def look(self: Feed) -> None:
        nonlocal looks
        looks += 1
        raise RuntimeError("something that nobody foresaw")

    monkeypatch.setattr(Feed, "look", look)
    feed = Feed(daemon.peer, list, poll_s=POLL_S)
    page = feed.open()
    await until(lambda: looks > 2)
    feed.close(page)
    assert "something that nobody foresaw" in caplog.text


def test_the_page_shows_the_limits_that_a_peer_keeps_by_its_flags(daemon: FakeDaemon) -> None:
    keep(daemon.peer, {"upload_mbit": 5.0})
    assert {row["name"]: row["value"] for row in changeable(daemon.peer)}["upload_mbit"] == 5.0
