"""Strikes that wait for a phase: whom they mean, when they come, and one after the other, on peers that only talk."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from p2pllm.errors import DaemonError
from p2pllm.rounds import plan
from p2pllm_peers.lab import aiming
from p2pllm_peers.lab.aiming import Aiming
from p2pllm_peers.lab.evidence import Strike, Struck
from p2pllm_peers.lab.scenario import Event, Link, Peers, Scenario
from p2pllm_peers.lab.timeline import aimed_at, timeline

RUN_ID = "ab" * 32
NAMES = ("a", "b", "c")
PHASES = ("collecting", "roster", "exchange", "vote", "commit")
LINK = Link(up_mbit=20, down_mbit=100, delay_ms=5)


class Peer:
    """What the aim knows of a peer: its id, its socket, and whether it is up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = {"peer_id": f"id-{name}", "socket": name}
        self.is_up, self.frozen = True, False


class Talk:
    """Three peers that go through the phases of their rounds, one step with each question."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, skips: str = "") -> None:
        """skips: a phase that none of them is ever seen in."""
        self.peers = {name: Peer(name) for name in NAMES}
        self.phases = [phase for phase in PHASES if phase != skips]
        self.asked: list[str] = []
        self.away: set[str] = set()
        self.silent: set[str] = set()
        monkeypatch.setattr(aiming, "ask", self._ask)
        for pause in ("POLL_S", "BRIEF_S", "REST_S"):
            monkeypatch.setattr(aiming, pause, 0.0)

    @property
    def head(self) -> tuple[int, bytes]:
        round_ = len(self.asked) // len(self.phases)
        return (round_, round_.to_bytes(32, "big"))

    @property
    def ranked(self) -> list[str]:
        """Names, as they would lead the round after the head."""
        return [peer[3:] for peer in plan.ranked(RUN_ID, self.head, [f"id-{name}" for name in NAMES])]

    def _ask(self, socket: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert request == {"do": "status"} and timeout <= 1
        if socket in self.silent:
            raise DaemonError("The daemon does not answer.")
        round_, digest = self.head
        row = {"phase": self.phases[len(self.asked) % len(self.phases)], "round": round_, "record": digest.hex()}
        self.asked.append(socket)
        rows = [
            row | {"peer": f"id-{name}", "phase": "joining" if name in self.away else row["phase"]}
            for name in NAMES
            if name != socket
        ]
        return row | {"peer_id": f"id-{socket}", "run_id": RUN_ID, "peers": rows}


class Deeds:
    """Carries nothing out, and remembers it."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.done: list[Strike] = []
        self.heads: list[tuple[int, bytes]] = []

    def __call__(self, strike: Strike, row: Struck) -> None:
        self.done.append(strike)
        self.heads.append(self.talk.head)


def planned_for(*events: Event, peers: tuple[Peers, ...] = ()) -> Scenario:
    """For a minute, on lines; without `peers` it is a, b and c."""
    peers = peers or tuple(Peers(name=name, cores=0.5, link="home") for name in NAMES)
    return Scenario(name="x", duration_s=60, links={"home": LINK}, peers=peers, events=events)


def aim(talk: Talk, *events: Event) -> tuple[Aiming, Deeds]:
    scenario = planned_for(*events)
    specs, deeds, began = {spec.name: spec for spec in scenario.peer_specs()}, Deeds(talk), time.monotonic()
    swarm: Any = talk
    return Aiming(timeline(scenario), swarm, specs, deeds, lambda: time.monotonic() - began), deeds


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("who", "rank"), [("leader", 0), ("member", -1)])
def test_the_leader_and_a_member_are_struck_in_every_phase(
    monkeypatch: pytest.MonkeyPatch, phase: str, who: str, rank: int
) -> None:
    talk = Talk(monkeypatch)
    aiming_, deeds = aim(talk, Event(phase=phase, do="kill", peer=who))
    aiming_.run()
    (strike,), (row,) = deeds.done, aiming_.rows
    assert row.round is not None and row.round >= aiming.CALM_ROUNDS
    head = (row.round, row.round.to_bytes(32, "big"))
    assert strike.peer == row.peer == plan.ranked(RUN_ID, head, [f"id-{name}" for name in NAMES])[rank][3:]
    assert (row.phase, row.error) == (phase, "") and row.age_s is not None and 0 <= row.age_s < 1
    assert talk.asked[-1] == row.peer, "it was struck for what another one said"


def test_one_after_the_other_each_undone_in_its_time_and_followed_by_rounds_without_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk = Talk(monkeypatch)
    slow = Event(phase="exchange", do="slow_link", peer="leader", link={"up_mbit": 1.0}, for_s=0.2)
    kill = Event(phase="vote", do="kill", peer="b", for_s=0.1, keep_disk=False)
    aiming_, deeds = aim(talk, slow, kill)
    aiming_.run()
    assert [strike.do for strike in deeds.done] == ["slow_link", "restore_link", "kill", "restart"]
    first, second = deeds.done[0].peer, deeds.done[2].peer
    assert [strike.peer for strike in deeds.done] == [first, first, "b", "b"] and second == "b"
    assert [strike.args["link"]["up_mbit"] for strike in deeds.done[:2]] == [1.0, 20.0]
    assert deeds.done[0].args["link"] == LINK.model_dump() | {"up_mbit": 1.0}
    assert deeds.done[3].args == {"keep_disk": False}
    times = [row.at_s for row in aiming_.rows]
    assert times[1] - times[0] >= 0.2 and times[3] - times[2] >= 0.1 and times == sorted(times)
    assert [row.event for row in aiming_.rows] == [0, 1, 2, 3]
    assert deeds.heads[2][0] >= deeds.heads[1][0] + aiming.CALM_ROUNDS


@pytest.mark.parametrize("what", ["away", "silent", "never"])
def test_nobody_is_struck_while_the_swarm_is_not_whole(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """c is still joining, the one that is asked does not answer, or the phase does not come."""
    talk = Talk(monkeypatch, skips="vote" if what == "never" else "")
    talk.away = {"c"} if what == "away" else set()
    talk.silent = set(NAMES) if what == "silent" else set()
    aiming_, deeds = aim(talk, Event(phase="vote", do="kill", peer="leader"), Event(phase="vote", do="stop", peer="a"))
    threading.Timer(0.2, aiming_.stop).start()
    aiming_.run()
    assert deeds.done == []
    errors = [row.error for row in aiming_.rows]
    assert errors == [f"the end came before the {who} was seen in the phase vote" for who in ("leader", "a")]


def test_it_does_not_begin_before_its_time_and_does_not_count_those_who_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk = Talk(monkeypatch)
    talk.peers["c"].is_up, talk.peers["b"].frozen = False, True
    talk.away = {"b", "c"}
    aiming_, deeds = aim(talk, Event(phase="roster", after_s=0.3, do="freeze", peer="a", for_s=0.1))
    aiming_.run()
    assert [strike.do for strike in deeds.done] == ["freeze", "thaw"]
    assert aiming_.rows[0].at_s >= 0.3 and set(talk.asked) == {"a"}


def test_what_waits_for_a_phase_comes_last_each_with_what_undoes_it() -> None:
    planned = timeline(
        planned_for(
            Event(phase="vote", after_s=9, do="kill", peer="member", for_s=3, keep_disk=False),
            Event(phase="exchange", do="slow_link", peer="leader", link={"up_mbit": 1.0}, for_s=2),
            Event(phase="roster", do="cut", peer="a-0", other="a-1", for_s=1),
            Event(phase="commit", do="corrupt", peer="a-0", file="log"),
            peers=(Peers(name="a", count=3, link="home"), Peers(name="late", link="home", start_s=50)),
        )
    )
    assert [(s.at_s, s.do, s.peer, s.args, s.phase, s.undoes) for s in planned] == [
        (50, "join", "late", {}, "", None),
        (9, "kill", "member", {}, "vote", None),
        (12, "restart", "member", {"keep_disk": False}, "", 1),
        (0, "slow_link", "leader", {"link": {"up_mbit": 1.0}}, "exchange", None),
        (2, "restore_link", "leader", {}, "", 3),
        (0, "cut", "a-0", {"other": "a-1"}, "roster", None),
        (1, "mend", "a-0", {"other": "a-1"}, "", 5),
        (0, "corrupt", "a-0", {"file": "log"}, "commit", None),
    ]


def test_a_strike_gets_what_depends_on_its_victim() -> None:
    events = (
        Event(phase="vote", do="slow_link", peer="leader", link={"up_mbit": 1.0}, for_s=2),
        Event(phase="vote", do="slow_machine", peer="leader", cores=0.1, for_s=2),
    )
    made = planned_for(*events)
    victim = made.peer_specs()[1]
    assert victim.link is not None
    line = victim.link.model_dump()
    struck = [aimed_at(strike, victim) for strike in timeline(made)]
    assert {strike.peer for strike in struck} == {"b"}
    assert [strike.args for strike in struck] == [
        {"link": line | {"up_mbit": 1.0}}, {"link": line}, {"cores": 0.1}, {"cores": 0.5}
    ]  # fmt: skip
