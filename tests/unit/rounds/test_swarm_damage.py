"""Disks that fail, memory that is damaged, and deaths between vote and commit, in whole swarms in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from p2pllm.errors import StateError
from p2pllm.rounds.loop import MEND_S
from p2pllm.rounds.messages import Vote
from p2pllm.rounds.record import Record
from p2pllm.rounds.update import Update
from p2pllm.state.chunks import digest_of
from p2pllm.testing import MemoryPeer, MemorySwarm, virtual

Switch = Callable[[bool], None]


def fail_disk(peer: MemoryPeer, what: str, monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Let a part of a peer's disk be full whenever the switch says so."""
    full, log = [True], peer.disk.log
    parts: list[tuple[Any, str]] = [(peer.disk.aggregates, "put")]
    if what == "log":
        parts = [(log, "append"), (log, "switch")]
    for owner, name in parts:
        real = getattr(owner, name)

        def put(*arguments: object, real: Callable[..., object] = real) -> object:
            if full[0]:
                raise StateError("The disk is full.")
            return real(*arguments)

        monkeypatch.setattr(owner, name, put)
    return lambda now: full.__setitem__(0, now)


def record_at(peer: MemoryPeer, round_: int) -> Record:
    record = peer.disk.log.record(round_)
    assert record is not None
    return record


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("what", ["aggregates", "log"])
@virtual
async def test_a_full_disk_at_one_peer_stops_no_other(
    what: str, count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    swarm = MemorySwarm(rounds=10**6)
    *others, poor = swarm.add(count)
    clock = asyncio.get_running_loop().time
    await swarm.start()
    await swarm.until(lambda: all(len(peer.records) > 1 and len(peer.records[-1].members) == count for peer in others))
    with caplog.at_level(logging.ERROR):
        switch = fail_disk(poor, what, monkeypatch)
        begin, since, stood = clock(), others[0].keeper.head[0], poor.keeper.head
        await swarm.until(lambda: others[0].keeper.head[0] >= since + 5)
    assert clock() - begin < 40.0
    assert poor.keeper.head[0] <= stood[0] + 1
    swarm.check_states()
    assert "The disk is full" in caplog.text
    switch(False)
    await swarm.until(lambda: len(others[0].records[-1].members) == count)
    await swarm.until(lambda: poor.disk.log.has(others[0].keeper.head) or others[0].disk.log.has(poor.keeper.head))
    swarm.check_states()
    swarm.check_rounds()


@virtual
async def test_a_disk_that_stays_full_costs_little_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = MemorySwarm(rounds=10**6)
    other, poor = swarm.add(2)
    await swarm.start()
    await swarm.until(lambda: poor.keeper.head[0] >= 2)
    switch = fail_disk(poor, "aggregates", monkeypatch)
    other.compute.step_s = 4.0  # long rounds, a short test
    swarm_time = asyncio.get_running_loop().time
    tries, put = set[float](), poor.disk.aggregates.put

    def counted(*arguments: Any) -> Any:
        tries.add(swarm_time())
        return put(*arguments)

    monkeypatch.setattr(poor.disk.aggregates, "put", counted)
    await asyncio.sleep(20 * MEND_S)
    assert 10 < len(tries) < 40, "each may come after a state that was fetched for nothing"
    await poor.loop.pause("for a test")
    await swarm.until(lambda: poor.view.own.phase == "paused", timeout=1.0)
    await poor.loop.resume()
    switch(False)
    await swarm.until(lambda: poor.id in other.records[-1].members, timeout=2 * MEND_S)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("what", ["aggregates", "log"])
@virtual
async def test_an_update_for_which_the_disk_was_full_is_in_one_record(
    what: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others commit it, or else it waits for the next round."""
    swarm = MemorySwarm(rounds=10**6)
    *others, poor = swarm.add(count)
    await swarm.start()
    await swarm.until(lambda: len(poor.records) >= 2 and len(poor.records[-1].members) == count)
    finished: list[bytes] = []
    finish = poor.compute.finish

    async def watched(go_on: bool) -> Update | None:
        update: Update | None = await finish(go_on)
        if update is not None:
            finished.append(digest_of(update.vector.data.cast("B")))
            poor.compute.step_s = 5.0  # it has nothing else to bring
        return update

    poor.compute.finish = watched
    switch = fail_disk(poor, what, monkeypatch)
    await swarm.until(lambda: bool(poor.loop.trouble))
    switch(False)
    (update,) = finished
    peer = [*others, poor][0]

    def records_with_it() -> list[int]:
        return [
            record.body.round
            for record in peer.disk.log.records()
            if record is not None and any(claim.update == update for claim in record.body.members)
        ]

    await swarm.until(lambda: bool(records_with_it()), 20.0)
    assert len(finished) == 1, "it was computed anew"
    poor.compute.step_s = 0.1
    await swarm.until(lambda: poor.keeper.head[0] >= records_with_it()[0] + 5)
    assert len(records_with_it()) == 1


@virtual
async def test_a_disk_that_is_full_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    swarm = MemorySwarm(rounds=10**6)
    first, poor = swarm.add(2)
    await swarm.start()
    await swarm.until(lambda: poor.keeper.head[0] == 3)
    with caplog.at_level(logging.ERROR, logger="p2pllm.rounds.loop"), pytest.MonkeyPatch.context() as monkeypatch:
        fail_disk(poor, "log", monkeypatch)
        since = first.keeper.head[0]
        await swarm.until(lambda: first.keeper.head[0] >= since + 30)
    told = [entry for entry in caplog.records if "takes no part until this is mended" in entry.message]
    assert len(told) == 1


@pytest.mark.parametrize("what", ["params", "m", "v"])
@pytest.mark.parametrize("count", [2, 3])
@virtual
async def test_a_state_that_is_damaged_in_memory_is_found_and_made_anew(
    what: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    swarm = MemorySwarm(rounds=10)
    peers = swarm.add(count)
    bad = peers[-1]

    def damage() -> None:
        dict(zip(("params", "m", "v"), bad.keeper.state.vectors, strict=True))[what].view(np.uint32)[7] ^= 1 << 20

    bad.at("collecting", 3, damage)
    with caplog.at_level(logging.ERROR):
        await swarm.start()
        await swarm.finish()
    swarm.check_rounds()
    assert "the state in memory is not that of round 3 any more" in caplog.text
    for peer in peers:
        assert [peer.disk.log.digest(round_) for round_ in range(11)] == [
            peers[0].disk.log.digest(round_) for round_ in range(11)
        ]
        assert len(peer.records[-1].members) == count
    record = peers[0].disk.log.record(4)
    assert record is not None
    assert bad.id in record.body.peers, "its update was right; only its state was not"


@pytest.mark.parametrize("victim", [0, 1, 2])
@virtual
async def test_a_member_that_dies_between_its_vote_and_its_commit_changes_no_record(victim: int) -> None:
    swarm = MemorySwarm(rounds=10)
    peers = swarm.add(3)
    dying = peers[victim]
    asked: list[Record] = []

    async def die(record: Record) -> dict[str, float]:
        if record.body.round < 4:
            return await commit(record)
        asked.append(record)
        dying.kill()
        await asyncio.sleep(1.0)
        raise AssertionError("it is dead")

    commit, dying.keeper.commit = dying.keeper.commit, die  # type: ignore[method-assign]
    await swarm.start()
    await swarm.until(lambda: dying.host.dead)
    again = swarm.restart(dying)
    assert again.keeper.head[0] == 3
    await swarm.start(again)
    await swarm.finish()
    for peer in swarm.peers:
        assert peer.disk.log.has(asked[0].head), "what it was about to commit is what all have committed"


@pytest.mark.parametrize("count", [2, 3])
@virtual
async def test_what_the_only_one_that_heard_the_majority_committed_is_not_lost(count: int) -> None:
    """Votes reach the victim alone. It commits and dies, and nobody else knows that there was a majority."""
    swarm = MemorySwarm(rounds=10)
    *others, victim = swarm.add(count)
    lost: list[bool] = [True]
    for peer in swarm.peers:
        send = peer.votes._send

        def only_to_it(
            member: str, vote: Vote, failed: Callable[[str], None], send: Callable[..., None] = send
        ) -> None:
            if member == victim.id or not lost[0] or victim.keeper.head[0] < 3:
                send(member, vote, failed)

        peer.votes._send = only_to_it  # type: ignore[method-assign, assignment]

    await swarm.start()
    await swarm.until(lambda: victim.keeper.head[0] == 4)
    assert {peer.keeper.head[0] for peer in others} == {3}
    committed = victim.keeper.head
    victim.kill()
    lost[0] = False
    await swarm.until(lambda: all(peer.keeper.head[0] >= 4 for peer in others))
    for peer in others:
        assert peer.disk.log.has(committed)
        record = record_at(peer, 4)
        assert victim.id in record.body.peers
        assert record.has_majority == (count == 3)
    again = swarm.restart(victim)
    assert again.keeper.head == committed
    await swarm.start(again)
    await swarm.finish()
    assert all(peer.disk.log.has(committed) for peer in swarm.peers)
    assert again.disk.log.abandoned() == []


@virtual
async def test_a_member_without_the_aggregate_takes_it_from_who_voted() -> None:
    """Its exchange fails; the others have a majority, and it commits what they committed."""
    swarm = MemorySwarm(rounds=6)
    peers = swarm.add(3)
    poor = peers[2]
    exchange = poor.exchange.run

    async def fail(group: object, vector: np.ndarray, deadline: float) -> object:
        result = await exchange(group, vector, deadline)
        if poor.keeper.head[0] != 2:
            return result
        return result.__class__(None, frozenset(), "The last part did not come.", 0, 0)

    poor.exchange.run = fail
    await swarm.start()
    await swarm.finish()
    swarm.check_rounds()
    record = record_at(peers[0], 3)
    assert poor.id in record.body.peers and len(record.body.peers) == 3
    assert poor.disk.log.has(record.head)
    assert poor.id not in record.voters
