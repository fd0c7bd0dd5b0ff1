"""SwarmView: what of others' statuses counts, and what waits for a change."""

from __future__ import annotations

import asyncio

import pytest
from protocol_nodes import HEAD, RUN, make_nodes, timed

from p2pllm.rounds import plan
from p2pllm.rounds.chain import start_of
from p2pllm.rounds.messages import Status
from p2pllm.rounds.swarm import DOUBT_S, MAX_HEARD, OUTDATED_S
from p2pllm.testing import branch, status, virtual

OWN = branch(*HEAD)


@virtual
async def test_what_we_say_is_our_branch() -> None:
    node, _ = await make_nodes(2)
    said = branch(7, 5, total=99, anchor=6)
    node.view.say(branch=said, phase="collecting", samples=4)
    node.view.say(tokens_per_s=2.5)
    own = Status.unpack(node.view.own_bytes())
    assert (own.branch, own.phase, own.samples, own.tokens_per_s) == (said, "collecting", 4, 2.5)


@virtual
async def test_what_is_not_urgent_is_told_with_the_next_heartbeat() -> None:
    node, _ = await make_nodes(2)
    pushes: list[int] = []
    assert node.view._liveness is not None
    node.view._liveness.push = lambda but=(): pushes.append(node.view.own.samples)  # type: ignore[method-assign]
    node.view.say(samples=4, at_once=False)
    assert pushes == [] and node.view.own.samples == 4
    node.view.say(samples=8)
    node.view.announce()
    assert pushes == [8, 8]


@virtual
async def test_a_paused_peer_is_left_in_peace() -> None:
    node, other = await make_nodes(2)
    spared: list[list[str]] = []
    assert node.view._liveness is not None
    node.view._liveness.push = lambda but=(): spared.append(list(but))  # type: ignore[method-assign]
    for phase in ("collecting", "paused", "collecting"):
        other.view.say(phase=phase)
        node.view.hear(other.id, other.view.own_bytes())
        node.view.announce()
    assert spared == [[], [other.id], []]


@virtual
async def test_the_view_shows_the_living_and_is_bounded() -> None:
    node, other = await make_nodes(2)
    for number in range(2000):
        node.view.hear(f"stranger-{number}", status(3, 1).pack())
    assert len(node.view._heard) <= MAX_HEARD + 1
    assert node.view.statuses().keys() == {other.id}


@virtual
async def test_claims_that_cannot_be_count_for_nothing() -> None:
    node, other = await make_nodes(2)
    start = start_of(RUN)
    for round_, digest, total, counts in [
        (101, b"\x01" * 32, 10**6, False),  # after the run's end
        (0, b"\x05" * 32, 0, False),  # round 0 of another run
        (0, start.head[1], 10**6, False),  # nothing was done, but it claims samples
        (0, start.head[1], 0, True),
        (100, b"\x01" * 32, 10**6, True),
    ]:
        said = status(round_, digest, total=total)
        node.view.hear(other.id, said.pack())
        heard = node.view.statuses()[other.id]
        assert heard == (said if counts else said.model_copy(update={"phase": "joining"}))
    node.view.hear(other.id, b"nonsense")
    assert node.view.statuses()[other.id] == heard


@virtual
async def test_who_is_doubted_counts_again_after_a_while() -> None:
    node, other = await make_nodes(2)
    node.hear(other.id, round_=9)
    assert plan.branch_to_follow(OWN, node.view.statuses()) == branch(9, 1)
    node.view.doubt([other.id])
    assert plan.branch_to_follow(OWN, node.view.statuses()) is None
    await asyncio.sleep(DOUBT_S + 1)
    assert plan.branch_to_follow(OWN, node.view.statuses()) == branch(9, 1)


@virtual
async def test_a_late_heartbeat_does_not_undo_what_is_known_to_be_committed() -> None:
    node, other = await make_nodes(2)
    node.view.presume_commit([other.id], OWN.head[0])
    node.hear(other.id, phase="exchange")  # sent before
    assert node.view.statuses()[other.id].phase == "commit"
    await asyncio.sleep(OUTDATED_S + 0.1)
    node.hear(other.id, phase="exchange")  # it said so all the time: then it is so
    assert node.view.statuses()[other.id].phase == "exchange"


@virtual
async def test_waiting_ends_with_a_change_or_in_time() -> None:
    node, _ = await make_nodes(2)
    asyncio.get_running_loop().call_later(1.0, node.view.notify)
    assert (await timed(node.view.wait_change(5.0)))[1] == pytest.approx(1.0, abs=0.01)
    assert (await timed(node.view.wait_until(lambda: False, 2.0)))[0] is False
