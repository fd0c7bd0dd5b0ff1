"""Who is alive, decided on a clock that only the test moves."""

from hypothesis import given
from hypothesis import strategies as st

from p2pllm.network.table import (
    ALIVE_S,
    BEATS_A_SECOND,
    DIALS,
    FORGET_S,
    MAX_BACKOFF_S,
    MAX_MEMBERS,
    PUSH_EVERY_S,
    RETRY_S,
    MemberTable,
)
from p2pllm.testing import peer_number

ME, ANN, BOB = peer_number(1), peer_number(2), peer_number(3)


def table_with(*peers, now=0.0):
    table = MemberTable(ME)
    for peer in peers:
        assert table.heard(peer, now, [f"/ip4/10.0.0.1/tcp/1/p2p/{peer}"])
    return table


def test_hearsay_is_not_alive_but_due():
    table = MemberTable(ME)
    assert table.learn(ANN, ["/a"], 0.0)
    assert not table.alive(0.0) and table.due(0.0) == [ANN]
    assert not table.learn(ME, ["/a"], 0.0)


def test_silence_ends_life():
    table = table_with(ANN)
    assert table.alive(ALIVE_S - 0.01) == {ANN}
    assert not table.alive(ALIVE_S)


def test_refused_twice_is_dead_at_once():
    table = table_with(ANN)
    table.beat_sent(ANN, 1.0)
    table.failed(ANN, 1.0, refused=True)
    assert table.alive(1.0) == {ANN}
    assert table.due(1.0 + RETRY_S) == [ANN]
    table.beat_sent(ANN, 1.2)
    table.failed(ANN, 1.2, refused=True)
    assert not table.alive(1.2)


def test_no_answer_is_not_refusal():
    table = table_with(ANN)
    for now in (1.0, 2.0, 3.0):
        table.beat_sent(ANN, now)
        table.failed(ANN, now, refused=False)
        assert table.alive(now) == {ANN}


def test_backoff_grows_and_is_bounded_and_an_answer_revives():
    table = table_with(ANN)
    now, gaps = 10.0, []
    for _ in range(10):
        table.beat_sent(ANN, now)
        table.failed(ANN, now, refused=True)
        step = 0.0
        while not table.due(now + step):
            step += 0.5
        gaps.append(step)
        now += step
    assert gaps == sorted(gaps) and gaps[0] <= 1 and gaps[-1] == MAX_BACKOFF_S
    table.heard(ANN, now)
    assert table.alive(now) == {ANN}


def test_goodbye_removes_and_hearsay_does_not_bring_back():
    table = table_with(ANN)
    table.left(ANN, 1.0)
    assert ANN not in table
    assert not table.learn(ANN, ["/a"], 2.0)
    assert table.heard(ANN, 3.0) and table.alive(3.0) == {ANN}


def test_hearsay_does_not_overrule_a_members_own_word():
    table = table_with(ANN)
    own = table[ANN].addresses
    assert not table.learn(ANN, ["/evil"], 1.0)
    assert table[ANN].addresses == own


def test_push_is_limited():
    table = table_with(ANN)
    table.beat_sent(ANN, 0.5)
    table.push()
    assert not table.due(0.55)
    assert table.due(0.51 + PUSH_EVERY_S) == [ANN]
    table.beat_sent(ANN, 0.51 + PUSH_EVERY_S)
    assert not table.due(0.52 + 2 * PUSH_EVERY_S)


def test_who_need_not_know_soon_is_told_with_its_next_beat():
    table = table_with(ANN, BOB)
    for peer in (ANN, BOB):
        table.beat_sent(peer, 0.5)
    table.push(but=[BOB, "unknown"])
    assert table.due(0.6 + PUSH_EVERY_S) == [ANN]
    assert set(table.due(2.0)) == {ANN, BOB}
    table.push()
    assert set(table.due(0.6 + PUSH_EVERY_S)) == {ANN, BOB}


def test_a_joiner_calls_those_whom_it_does_not_know_to_live_a_few_at_a_time():
    table = table_with(ANN)
    strangers = [peer_number(number) for number in range(10, 10 + 3 * DIALS)]
    for number, stranger in enumerate(strangers):
        table.learn(stranger, ["/x"], 1.0 + number / 100)
    called = []
    for look in range(4):
        due = table.due(2.0 + look / 10)
        assert len([peer for peer in due if peer != ANN]) <= DIALS
        for peer in due:
            table.beat_sent(peer, 2.0 + look / 10)
            called.append(peer)
    assert [peer for peer in called if peer != ANN] == strangers, "who has waited longest is called first"


def test_the_silent_and_those_of_hearsay_slow_nothing_down():
    table = table_with(ANN)
    for number in range(10, 10 + 2 * BEATS_A_SECOND):
        table.learn(peer_number(number), ["/x"], 0.0)
    table.alive(1.0)
    assert table.slowness == 1.0
    for number in 2 * list(range(10, 10 + 2 * BEATS_A_SECOND)):
        table.heard(peer_number(number), 1.0)
    table.alive(1.0)
    assert 2.0 <= table.slowness < 2.1
    assert len(table.alive(1.0 + 0.99 * ALIVE_S * 2)) > BEATS_A_SECOND, "borne with for longer"
    table.alive(30.0)
    assert table.slowness == 1.0


def test_the_dead_are_forgotten_unless_pinned():
    table = table_with(ANN)
    table.learn(BOB, ["/b"], 0.0, pinned=True)
    table.learn(peer_number(4), ["/c"], 0.0)
    table.forget(FORGET_S / 5 + 1)
    assert set(table.known()) == {ANN, BOB}
    table.forget(FORGET_S + 1)
    assert set(table.known()) == {BOB}


def test_the_table_is_bounded_and_callers_displace_hearsay():
    table = table_with(ANN)
    for number in range(10, 10 + 2 * MAX_MEMBERS):
        table.learn(peer_number(number), ["/x"], 0.0)
    assert len(table.known()) == MAX_MEMBERS
    assert table.heard(BOB, 1.0) and table.alive(1.0) == {ANN, BOB}
    assert len(table.known()) == MAX_MEMBERS


def test_the_living_are_never_displaced():
    table = table_with(*(peer_number(number) for number in range(10, 10 + MAX_MEMBERS)))
    assert not table.heard(BOB, 1.0)
    assert len(table.alive(1.0)) == MAX_MEMBERS


def test_our_own_pause_kills_nobody():
    table = table_with(ANN)
    table.forgive(60.0, 61.0)
    assert table.alive(61.0) == {ANN}
    assert not table.alive(61.0 + ALIVE_S)


@given(st.lists(st.tuples(st.sampled_from("hfxltg"), st.integers(0, 4), st.floats(0, 3)), max_size=60))
def test_the_living_are_those_that_are_alive(steps):
    """`alive` remembers its answer; whatever happens, it is what a look at every member gives."""
    table, now = MemberTable("me"), 0.0
    for what, number, gap in steps:
        now += gap
        peer = f"peer-{number}"
        if what == "h":
            table.heard(peer, now)
        elif what in "fx":
            table.failed(peer, now, refused=what == "x")
        elif what == "l":
            table.left(peer, now)
        elif what == "g":
            table.forgive(gap, now)
        else:
            table.forget(now)
        everyone = [f"peer-{other}" for other in range(5) if f"peer-{other}" in table]
        assert table.alive(now) == {other for other in everyone if table[other].is_alive(now)}
