"""The network in memory: latency, what hangs and what breaks, and what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.network.transport import MAX_CALL_BYTES
from p2pllm.testing import MemoryHost, MemoryNetwork, virtual


async def echo(peer: str, payload: bytes) -> bytes:
    return payload


async def slow_echo(peer: str, payload: bytes) -> bytes:
    await asyncio.sleep(1.0)
    return payload


async def make_hosts(count: int, network: MemoryNetwork | None = None) -> list[MemoryHost]:
    network = network or MemoryNetwork()
    hosts = [network.host(number) for number in range(count)]
    for host in hosts:
        await host.serve_call("echo", echo)
        await host.serve_call("slow", slow_echo)
    return hosts


async def took(work: Awaitable[object]) -> float:
    """Seconds until it ended, well or not."""
    clock = asyncio.get_running_loop().time
    begin = clock()
    await asyncio.gather(work, return_exceptions=True)
    return clock() - begin


def ask(one: MemoryHost, other: MemoryHost, method: str = "echo", timeout: float = 2.0) -> Awaitable[bytes]:
    return one.call(other.peer_id, method, b"hello", timeout)


# -- calls -------------------------------------------------------------------------------------------------------


@virtual
async def test_a_call_takes_the_way_there_and_back():
    one, two, three = await make_hosts(3, MemoryNetwork(latency_s=0.03))
    one.network.set_latency(one.peer_id, two.peer_id, 0.2)
    assert await took(ask(one, two)) == pytest.approx(0.4)
    assert await took(ask(two, one)) == pytest.approx(0.4)
    assert await took(ask(one, three)) == pytest.approx(0.06)
    one.network.slow(three.peer_id, 0.5)
    assert await took(ask(one, three)) == pytest.approx(1.06)
    one.network.slow(three.peer_id, 0.0)
    assert await took(ask(one, three)) == pytest.approx(0.06)


@virtual
async def test_jitter_follows_from_the_seed():
    async def times(seed: int) -> list[float]:
        one, two = await make_hosts(2, MemoryNetwork(latency_s=0.1, jitter_s=0.05, seed=seed))
        return [round(await took(ask(one, two)), 6) for _ in range(20)]

    first = await times(1)
    assert first == await times(1)
    assert first != await times(2)
    assert len(set(first)) > 15
    assert all(0.2 <= time <= 0.3 for time in first)


@virtual
async def test_the_handler_knows_its_caller_and_the_caller_gets_the_reply():
    one, two = await make_hosts(2)

    async def who(peer: str, payload: bytes) -> bytes:
        return peer.encode() + payload

    await two.serve_call("who", who)
    assert await one.call(two.peer_id, "who", b"!", 1.0) == one.peer_id.encode() + b"!"


@virtual
async def test_what_goes_wrong_is_a_network_error():
    one, two = await make_hosts(2)

    async def fail(peer: str, payload: bytes) -> bytes:
        raise ValueError("not today")

    async def chatter(peer: str, payload: bytes) -> bytes:
        return bytes(MAX_CALL_BYTES + 1)

    await two.serve_call("fail", fail)
    await two.serve_call("chatter", chatter)
    for method, words in [("fail", "not today"), ("chatter", "bytes"), ("other", "does not offer")]:
        with pytest.raises(NetworkError, match=words) as caught:
            await ask(one, two, method)
        assert not isinstance(caught.value, UnreachableError)
    with pytest.raises(NetworkError, match="are allowed"):
        await one.call(two.peer_id, "echo", bytes(MAX_CALL_BYTES + 1), 1.0)
    with pytest.raises(UnreachableError):
        await one.call("nobody", "echo", b"", 1.0)


@virtual
async def test_a_call_ends_at_its_time_out_whatever_its_handler_does():
    one, two = await make_hosts(2)
    assert await took(ask(one, two, "slow", timeout=0.5)) == pytest.approx(0.5)
    with pytest.raises(NetworkError, match=r"within 0\.5 s"):
        await ask(one, two, "slow", timeout=0.5)
    assert await ask(one, two, "slow", timeout=1.5) == b"hello"


@virtual
async def test_calls_with_one_time_out_end_each_at_its_own():
    one, two = await make_hosts(2)
    two.freeze()
    ends = []

    async def later(after: float) -> None:
        await asyncio.sleep(after)
        await took(ask(one, two, timeout=1.0))
        ends.append(round(asyncio.get_running_loop().time() - begin, 3))

    begin = asyncio.get_running_loop().time()
    await asyncio.gather(*(later(after) for after in (0.4, 0.0, 0.2)))
    assert ends == [1.0, 1.2, 1.4]
    assert not one.network._expiring


@virtual
async def test_addresses_are_needed_where_a_network_says_so():
    one, two = await make_hosts(2, MemoryNetwork(needs_addresses=True))
    with pytest.raises(UnreachableError, match="no address"):
        await ask(one, two)
    one.learn(two.peer_id, [two.address])
    assert await ask(one, two) == b"hello"
    assert await ask(two, one) == b"hello"  # which is connected with it now


@virtual
async def test_messages_and_bytes_are_counted_by_method():
    one, two = await make_hosts(2)
    for _ in range(3):
        await ask(one, two)
    await ask(two, one, "slow")
    assert (one.sent["echo"].messages, one.sent["echo"].bytes) == (3, 15)
    assert (one.received["echo"].messages, one.received["echo"].bytes) == (3, 15)
    assert (two.sent["slow"].messages, two.received["slow"].bytes) == (1, 5)
    assert two.sent.keys() == two.received.keys() == {"echo", "slow"}


@virtual
async def test_a_call_whose_caller_gives_up_as_it_arrives_is_served_as_it_was_sent():
    one, two = await make_hosts(2, MemoryNetwork(latency_s=1.0))
    heard = []

    async def hear(peer: str, payload: bytes) -> bytes:
        heard.append(payload)
        return b""

    await two.serve_call("hear", hear)
    await took(ask(one, two, "hear", timeout=1.0))
    await asyncio.sleep(1.0)
    assert heard == [b"hello"]


@virtual
async def test_nothing_is_kept_of_calls_that_ended():
    one, two = await make_hosts(2)
    for _ in range(1000):
        await ask(one, two, timeout=0.01)
    two.freeze()
    for _ in range(1000):
        await took(ask(one, two, timeout=0.01))
    network = one.network
    assert len(network._held) <= 128
    assert not network._agenda
    assert not network._expiring
    assert not one.tasks and not two.tasks
    two.thaw()
    assert not network._held


# -- faults ------------------------------------------------------------------------------------------------------


@virtual
async def test_calls_to_the_dead_are_refused_and_those_under_way_break():
    one, two = await make_hosts(2)
    asyncio.get_running_loop().call_later(0.5, two.kill)
    with pytest.raises(UnreachableError, match="was lost"):
        await ask(one, two, "slow")
    with pytest.raises(UnreachableError, match="refused"):
        await ask(one, two)
    with pytest.raises(UnreachableError):
        await ask(two, one)
    assert await took(ask(one, two)) < 0.1


@virtual
async def test_who_is_killed_gets_no_more_replies():
    one, two = await make_hosts(2)
    waiting = asyncio.ensure_future(ask(one, two, "slow"))  # a task of the test's, which goes on
    await asyncio.sleep(0.5)
    one.kill()
    with pytest.raises(UnreachableError, match="was lost"):
        await waiting


@virtual
async def test_the_dead_come_back_with_their_counters_and_nothing_else():
    one, two = await make_hosts(2)
    await ask(one, two)
    with pytest.raises(ValueError, match="already"):
        one.network.host(1)
    two.kill()
    again = one.network.host(1)
    assert (again.peer_id, again.received["echo"].messages) == (two.peer_id, 1)
    with pytest.raises(NetworkError, match="does not offer"):
        await ask(one, again)


@virtual
async def test_the_frozen_answer_when_they_go_on_if_it_is_not_too_late():
    one, two = await make_hosts(2)
    two.freeze()
    asyncio.get_running_loop().call_later(1.0, two.thaw)
    with pytest.raises(NetworkError, match="did not answer"):
        await ask(one, two, timeout=0.5)
    assert await took(ask(one, two)) == pytest.approx(0.502, abs=0.01)
    assert two.received["echo"].messages == 1  # who gave up is not heard


@virtual
async def test_the_frozen_do_nothing_and_find_out_what_time_it_is():
    one, two = await make_hosts(2)
    clock = asyncio.get_running_loop().time
    begin, seen = clock(), []

    async def live() -> None:
        while True:
            try:
                await ask(one, two, timeout=0.1)
            except NetworkError:
                seen.append("error")
            seen.append(round(clock() - begin, 1))
            await asyncio.sleep(1.0)

    one.spawn(live())
    await asyncio.sleep(1.5)
    one.freeze()
    await asyncio.sleep(10.0)
    assert seen == [0.0, 1.0]
    one.thaw()
    await asyncio.sleep(1.2)
    assert seen == [0.0, 1.0, 11.5, 12.5]


@virtual
async def test_a_reply_that_came_while_its_caller_was_frozen_counts():
    one, two = await make_hosts(2)
    call = one.spawn(one.call(two.peer_id, "slow", b"x", 2.0))
    await asyncio.sleep(0.5)
    one.freeze()
    await asyncio.sleep(60.0)
    assert not call.done()
    one.thaw()
    assert await call == b"x"


@virtual
async def test_a_call_that_its_frozen_caller_never_got_answered_fails_when_it_goes_on():
    one, two = await make_hosts(2)
    two.calls["never"] = lambda peer, payload: asyncio.sleep(1e6)
    call = one.spawn(one.call(two.peer_id, "never", b"x", 2.0))
    await asyncio.sleep(0.5)
    one.freeze()
    two.freeze()
    await asyncio.sleep(60.0)
    assert not call.done()
    one.thaw()
    with pytest.raises(NetworkError, match="did not answer"):
        await call


@virtual
async def test_the_frozen_can_be_killed():
    one, two = await make_hosts(2)
    endless = two.spawn(asyncio.sleep(1e6))
    two.freeze()
    await asyncio.sleep(1.0)
    two.kill()
    await asyncio.sleep(0.1)
    assert endless.cancelled()
    with pytest.raises(UnreachableError):
        await ask(one, two)


@virtual
async def test_a_host_does_not_freeze_itself():
    (one,) = await make_hosts(1)

    async def suicide() -> None:
        one.freeze()

    with pytest.raises(RuntimeError, match="from outside"):
        await one.spawn(suicide())


async def test_freezing_needs_the_virtual_clock():
    (one,) = await make_hosts(1)
    with pytest.raises(RuntimeError, match="virtual"):
        one.freeze()


Fault = Callable[[MemoryNetwork, list[str]], None]
CUTS: dict[str, tuple[Fault, Fault]] = {
    "path": (lambda n, p: n.cut(p[0], p[1]), lambda n, p: n.mend(p[1], p[0])),
    "peer": (lambda n, p: n.cut(p[1]), lambda n, p: n.mend(p[1])),
    "partition": (lambda n, p: n.partition([p[0], p[2]]), lambda n, p: n.partition()),
    "groups": (lambda n, p: n.partition([p[0], p[2]], [p[1]]), lambda n, p: n.heal()),
    "healed": (lambda n, p: n.cut(p[0], p[1]), lambda n, p: n.heal()),
}


@pytest.mark.parametrize("kind", CUTS)
@virtual
async def test_nothing_passes_a_cut_until_it_is_mended(kind: str):
    one, two, three = await make_hosts(3)
    network, ids = one.network, [one.peer_id, two.peer_id, three.peer_id]
    cut, mend = CUTS[kind]
    cut(network, ids)
    assert await ask(one, three) == b"hello"
    for asker, asked in ((one, two), (two, one)):
        with pytest.raises(NetworkError, match="did not answer"):
            await ask(asker, asked, timeout=0.5)
    waiting = asyncio.ensure_future(ask(two, one, timeout=2.0))
    await asyncio.sleep(1.0)
    mend(network, ids)
    assert await waiting == b"hello"


@virtual
async def test_a_cut_under_way_holds_the_reply_too():
    one, two = await make_hosts(2)
    waiting = asyncio.ensure_future(ask(one, two, "slow", timeout=10.0))
    await asyncio.sleep(0.5)
    one.network.cut(one.peer_id, two.peer_id)
    await asyncio.sleep(3.0)
    assert not waiting.done()
    one.network.mend(one.peer_id, two.peer_id)
    assert await waiting == b"hello"


@virtual
async def test_what_a_host_starts_while_it_serves_belongs_to_it():
    one, two = await make_hosts(2)
    ticks = []

    async def begin(peer: str, payload: bytes) -> bytes:
        tasks.append(asyncio.create_task(tick()))
        return b""

    async def tick() -> None:
        while True:
            await asyncio.sleep(1.0)
            ticks.append(1)

    tasks: list[asyncio.Task[None]] = []
    await two.serve_call("begin", begin)
    await ask(one, two, "begin")
    two.freeze()
    await asyncio.sleep(5.0)
    assert not ticks
