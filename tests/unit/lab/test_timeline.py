"""What happens when: the same for a seed everywhere, in order, nobody struck twice, enough peers left alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import UsageError
from p2pllm_peers.lab.checks import FIELDS
from p2pllm_peers.lab.evidence import Strike
from p2pllm_peers.lab.scenario import Churn, Event, Link, Peers, Scenario
from p2pllm_peers.lab.timeline import OPPOSITE, timeline

LINK = Link(up_mbit=20, down_mbit=100, delay_ms=(20, 60))
CALM_S, DURATION_S = 20.0, 600.0


def scenario(*events: Event, **fields: Any) -> Scenario:
    """Peers a-0, a-1 and a-2 on lines, with a disk each, for ten minutes."""
    peers = (Peers(name="a", count=3, cores=0.5, link="home", disk_mb=9),)
    return Scenario(
        **{"name": "x", "duration_s": DURATION_S, "links": {"home": LINK}, "peers": peers, "events": events} | fields
    )


def strikes(*events: Event, **fields: Any) -> list[tuple[float, str, str, dict[str, Any]]]:
    return [(strike.at_s, strike.do, strike.peer, strike.args) for strike in timeline(scenario(*events, **fields))]


CHURNS = st.builds(
    Churn,
    faults_per_hour=st.floats(30, 3600),
    mean_down_s=st.floats(0.1, 100),
    kinds=st.lists(st.sampled_from(["kill", "freeze", "stop", "cut"]), min_size=1, max_size=4).map(tuple),
    least_up=st.integers(0, 3),
    lose_disk=st.floats(0, 1),
    back_s=st.floats(0, 30),
    calm_s=st.just(CALM_S),
)
ANY_EVENTS = st.builds(
    Event,
    at_s=st.floats(0, DURATION_S - 1),
    do=st.sampled_from(["kill", "freeze", "stop", "cut", "slow_link", "slow_machine", "fill_disk", "pause"]),
    peer=st.just("any"),
    for_s=st.floats(0.5, 30),
    cores=st.just(0.1),
    link=st.just({"up_mbit": 1.0}),
)
SCENARIOS = st.builds(
    lambda seed, churn, count, late, event: scenario(
        *event,
        seed=seed,
        churn=churn,
        peers=(
            Peers(name="a", count=count, cores=0.5, link="home", disk_mb=9),
            *(Peers(name=f"late-{number}", link="home", start_s=at_s) for number, at_s in enumerate(late)),
        ),
    ),
    st.integers(0, 2**32 - 1),
    CHURNS,
    st.integers(1, 5),
    st.lists(st.floats(1, DURATION_S - 1), max_size=2),
    st.lists(ANY_EVENTS, max_size=1),
)


@given(SCENARIOS)
def test_the_same_in_order_and_before_the_end(given_: Scenario) -> None:
    planned = timeline(given_)
    assert timeline(Scenario.model_validate_json(given_.model_dump_json())) == planned
    assert [Strike.model_validate_json(strike.model_dump_json()) for strike in planned] == planned
    times = [strike.at_s for strike in planned]
    assert times == sorted(times) and all(0 <= time < DURATION_S for time in times)
    assert all(strike.do in {"join", *FIELDS} for strike in planned)


def spans(planned: list[Strike]) -> list[tuple[str, float, float]]:
    """(peer, from, until) of each fault; until the end where nothing undoes it. Fails where two faults overlap."""
    begun: dict[str, tuple[float, str]] = {}
    found = []
    for strike in planned:
        if strike.do == "join":
            continue
        if strike.peer in begun and strike.do == OPPOSITE[begun[strike.peer][1]]:
            at_s, _ = begun.pop(strike.peer)
            found.append((strike.peer, at_s, strike.at_s))
        else:
            assert strike.peer not in begun and strike.do in OPPOSITE, strike
            begun[strike.peer] = (strike.at_s, strike.do)
    return found + [(peer, at_s, DURATION_S) for peer, (at_s, _) in begun.items()]


@given(SCENARIOS)
def test_nobody_is_touched_twice_or_before_it_joins(given_: Scenario) -> None:
    planned = timeline(given_)
    joined = {spec.name: spec.start_s for spec in given_.peer_specs()}
    touched = spans(planned)
    assert all(joined[peer] <= at_s + 0.001 for peer, at_s, _ in touched)
    for (peer, _, until), (other, at_s, _) in itertools.combinations(sorted(touched), 2):
        assert peer != other or until <= at_s


@given(SCENARIOS)
def test_churn_leaves_enough_peers_alone_and_all_in_peace_at_the_end(given_: Scenario) -> None:
    given_ = given_.model_copy(update={"events": ()})
    churn, names = given_.churn, given_.names()
    touched = spans(timeline(given_))
    assert all(until <= DURATION_S - CALM_S + 0.001 for _, _, until in touched)
    joins = {spec.name: spec.start_s for spec in given_.peer_specs() if spec.start_s}
    for _, at_s, _ in touched:
        moment = at_s + 0.001  # times are rounded to milliseconds
        down = {peer for peer, begin, until in touched if begin <= moment and moment + 0.001 < until + churn.back_s}
        down |= {peer for peer, start_s in joins.items() if moment + 0.001 < start_s + churn.back_s}
        assert len(names) - len(down) >= churn.least_up


@given(st.integers(0, 2**32 - 1))
def test_churn_makes_room_for_an_event_that_is_to_come(seed: int) -> None:
    freeze = Event(at_s=300, do="freeze", peer="a-0", for_s=100)
    churn = Churn(faults_per_hour=600, mean_down_s=5, least_up=2, back_s=10, calm_s=CALM_S)
    touched = spans(timeline(scenario(freeze, seed=seed, churn=churn)))
    assert len(touched) > 5
    for peer, at_s, until in touched:
        assert (peer, at_s) == ("a-0", 300) or until + churn.back_s < 300 or at_s >= 400 + churn.back_s


@given(st.integers(0, 2**32 - 1))
def test_an_event_moves_no_fault_that_it_does_not_meet(seed: int) -> None:
    churn = Churn(faults_per_hour=200, calm_s=CALM_S)
    quiet = timeline(scenario(seed=seed, churn=churn))
    calm = Event(at_s=DURATION_S - 4, do="kill", peer="any")
    assert timeline(scenario(calm, seed=seed, churn=churn))[:-1] == quiet
    early = timeline(scenario(Event(at_s=5, do="kill", peer="a-0"), seed=seed, churn=churn))
    kinds = {strike.at_s: strike.do for strike in quiet if strike.do in churn.kinds}
    others = [strike for strike in early if strike.do in churn.kinds and strike.at_s != 5]
    assert all(kinds.get(strike.at_s, strike.do) == strike.do for strike in others)


def test_the_same_on_every_machine() -> None:
    churn = Churn(faults_per_hour=60, kinds=("kill", "freeze", "cut"), lose_disk=0.5)
    drawn = Event(at_s=300, do="freeze", peer="any", for_s=12.5)
    assert strikes(drawn, seed=2026, churn=churn, duration_s=400) == [
        (91.802, "kill", "a-1", {}),
        (97.508, "freeze", "a-2", {}),
        (97.526, "thaw", "a-2", {}),
        (102.664, "restart", "a-1", {"keep_disk": False}),
        (174.685, "freeze", "a-0", {}),
        (181.247, "thaw", "a-0", {}),
        (300.0, "freeze", "a-1", {}),
        (312.5, "thaw", "a-1", {}),
    ]


def test_how_many_faults_there_are_and_how_long_they_last() -> None:
    peers = (Peers(name="a", count=16),)
    churn = Churn(faults_per_hour=300, mean_down_s=10, kinds=("kill", "freeze"), lose_disk=0.25, back_s=0)
    planned = timeline(scenario(churn=churn, peers=peers, links={}, duration_s=36_000.0))
    lengths = [until - at_s for _, at_s, until in spans(planned)]
    assert len(lengths) == pytest.approx(3000, rel=0.06), "three standard deviations"
    assert sum(lengths) / len(lengths) == pytest.approx(10, rel=0.06)
    assert sum(strike.do == "kill" for strike in planned) == pytest.approx(1500, rel=0.06)
    restarts = [strike.args["keep_disk"] for strike in planned if strike.do == "restart"]
    assert restarts.count(False) / len(restarts) == pytest.approx(0.25, rel=0.15)
    assert len({strike.peer for strike in planned}) == 16


def test_late_peers_join() -> None:
    peers = (Peers(name="a"), Peers(name="b", count=2, start_s=40), Peers(name="c", start_s=20.0004))
    assert strikes(peers=peers, links={}) == [
        (20.0, "join", "c", {}),
        (40.0, "join", "b-0", {}),
        (40.0, "join", "b-1", {}),
    ]


@pytest.mark.parametrize(
    ("event", "begin", "end"),
    [
        (Event(at_s=1, do="kill", peer="a-0", for_s=2), {}, ("restart", {"keep_disk": True})),
        (Event(at_s=1, do="stop", peer="a-0", for_s=2, keep_disk=False), {}, ("restart", {"keep_disk": False})),
        (Event(at_s=1, do="freeze", peer="a-0", for_s=2), {}, ("thaw", {})),
        (Event(at_s=1, do="cut", peer="a-0", for_s=2), {"other": ""}, ("mend", {"other": ""})),
        (Event(at_s=1, do="cut", peer="a-0", other="a-2", for_s=2), {"other": "a-2"}, ("mend", {"other": "a-2"})),
        (Event(at_s=1, do="fill_disk", peer="a-0", for_s=2), {}, ("free_disk", {})),
    ],
    ids=lambda value: value.do if isinstance(value, Event) else "",
)  # fmt: skip
def test_an_event_and_its_end(event: Event, begin: dict[str, Any], end: tuple[str, dict[str, Any]]) -> None:
    assert strikes(event) == [(1.0, event.do, "a-0", begin), (3.0, end[0], "a-0", end[1])]


def test_a_slowed_machine_gets_back_the_share_that_it_began_with() -> None:
    slowed = Event(at_s=1, do="slow_machine", peer="a-0", cores=0.1, for_s=2)
    assert [strike[1:] for strike in strikes(slowed)] == [
        ("slow_machine", "a-0", {"cores": 0.1}),
        ("slow_machine", "a-0", {"cores": 0.5}),
    ]
    with pytest.raises(UsageError, match=r"2 \(slow_machine at 2 s\): a-0 is slowed already"):
        strikes(slowed, Event(at_s=2, do="slow_machine", peer="a-0", cores=0.2))


def test_events_that_have_no_end() -> None:
    corrupt = Event(at_s=2, do="corrupt", peer="a-0", file="state/*")
    down, up = Event(at_s=1, do="kill", peer="a-0"), Event(at_s=3, do="restart", peer="a-0", keep_disk=False)
    assert strikes(down, corrupt, up) == [
        (1.0, "kill", "a-0", {}),
        (2.0, "corrupt", "a-0", {"file": "state/*"}),
        (3.0, "restart", "a-0", {"keep_disk": False}),
    ]


def test_a_partition_names_everybody() -> None:
    split = Event(at_s=1, do="partition", groups=(("a-1",),), for_s=2)
    assert strikes(split) == [(1.0, "partition", "", {"groups": [["a-1"], ["a-0", "a-2"]]}), (3.0, "heal", "", {})]


def test_a_changed_line_is_given_whole_and_so_is_the_one_before() -> None:
    before = scenario().peer_specs()[1].link
    assert before is not None
    slowed = Event(at_s=1, do="slow_link", peer="a-1", link={"up_mbit": 1, "loss": 0.1}, for_s=2)
    (_, _, _, begin), (_, _, _, end) = strikes(slowed)
    assert Link(**begin["link"]) == before.model_copy(update={"up_mbit": 1.0, "loss": 0.1})
    assert Link(**end["link"]) == before


def test_a_path_is_the_same_from_both_its_ends() -> None:
    cut, mend = Event(at_s=1, do="cut", peer="a-2", other="a-0"), Event(at_s=2, do="mend", peer="a-0", other="a-2")
    assert strikes(cut, mend) == [(1.0, "cut", "a-0", {"other": "a-2"}), (2.0, "mend", "a-0", {"other": "a-2"})]
    with pytest.raises(UsageError, match=r"\[\[events\]\] 2 \(cut at 2 s\): a-0 is cut off already"):
        strikes(cut, Event(at_s=2, do="cut", peer="a-0", other="a-2"))
    whole = Event(at_s=2, do="cut", peer="a-0", for_s=1)
    assert [strike[1] for strike in strikes(cut, whole)] == ["cut", "cut", "mend"], "the path stays cut"


def test_at_one_moment_what_ends_comes_first() -> None:
    events = [Event(at_s=at_s, do="freeze", peer="a-0", for_s=5) for at_s in (15, 10, 20)]
    assert [strike[:2] for strike in strikes(*events)] == [
        (10.0, "freeze"), (15.0, "thaw"), (15.0, "freeze"), (20.0, "thaw"), (20.0, "freeze"), (25.0, "thaw"),
    ]  # fmt: skip


def test_events_of_one_moment_keep_the_order_of_the_file() -> None:
    events = [Event(at_s=10, do="kill", peer=peer) for peer in ("a-1", "a-0", "a-2")]
    assert [strike[2] for strike in strikes(*events)] == ["a-1", "a-0", "a-2"]


def test_what_would_be_undone_after_the_end_stays() -> None:
    assert strikes(Event(at_s=DURATION_S - 1, do="freeze", peer="a-0", for_s=1)) == [
        (DURATION_S - 1, "freeze", "a-0", {})
    ]
    assert len(strikes(Event(at_s=DURATION_S, do="freeze", peer="a-0", for_s=1), duration_s=0.0)) == 2, "no known end"


def test_a_killed_peer_is_frozen_no_more() -> None:
    events = [
        Event(at_s=1, do="freeze", peer="a-0"),
        Event(at_s=2, do="kill", peer="a-0", for_s=2),
        Event(at_s=5, do="freeze", peer="a-0"),
    ]
    assert [strike[1] for strike in strikes(*events)] == ["freeze", "kill", "restart", "freeze"]


def test_any_meets_only_peers_that_are_able_and_free() -> None:
    peers = (
        Peers(name="a", link="home"),
        Peers(name="b", link="home", disk_mb=9),
        Peers(name="late", link="home", start_s=50, disk_mb=9),
    )
    full = Event(at_s=10, do="fill_disk", peer="any", for_s=5)
    for seed in range(20):
        assert strikes(full, peers=peers, seed=seed)[0][2] == "b"
        cut = Event(at_s=10, do="cut", peer="any", other="a", for_s=5)
        assert strikes(cut, peers=peers, seed=seed)[0][2:] == ("a", {"other": "b"})
        busy = Event(at_s=14, do="freeze", peer="b", for_s=5)
        assert strikes(busy, Event(at_s=10, do="kill", peer="any", for_s=4), peers=peers, seed=seed)[0][2] == "a"
    drawn = {strikes(Event(at_s=60, do="freeze", peer="any"), peers=peers, seed=seed)[1][2] for seed in range(40)}
    assert drawn == {"a", "b", "late"}


def test_two_that_are_drawn_at_one_moment_are_two() -> None:
    twice = [Event(at_s=10, do="kill", peer="any")] * 3
    assert sorted(strike[2] for strike in strikes(*twice)) == ["a-0", "a-1", "a-2"]
    with pytest.raises(UsageError, match=r"\[\[events\]\] 4 \(kill at 10 s\): there is no peer that nothing else"):
        strikes(*twice, twice[0])


def test_every_action_has_its_fields_and_every_opposite_is_an_action() -> None:
    actions = set(Event.model_json_schema()["properties"]["do"]["enum"])
    assert set(FIELDS) == actions and {*OPPOSITE, *OPPOSITE.values()} <= actions
    assert {do for do, fields in FIELDS.items() if "for_s" in fields.takes} == set(OPPOSITE)
    assert all({*fields.needs, *fields.takes} <= set(Event.model_fields) for fields in FIELDS.values())
