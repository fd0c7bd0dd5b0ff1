"""How many threads compute beside other programs."""

from __future__ import annotations

from unittest import mock

import psutil
import pytest

from p2pllm_peers.crew import MEASURE_S, Crew, taken


class Machine:
    """Cores, and who takes them."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.quota = float(cores)
        self.now = self.own_s = self.all_s = 0.0

    def crew(self) -> Crew:
        return Crew(lambda: self.now, lambda: self.own_s, lambda: (self.all_s, self.cores), lambda: self.quota)

    def go_on(self, seconds: float, own: float, others: float) -> None:
        """For so long we take so many cores, and others so many."""
        self.now += seconds
        self.own_s += own * seconds
        self.all_s += (own + others) * seconds


@pytest.mark.parametrize(
    ("cores", "others", "threads"),
    [(2, 0.0, 2), (2, 0.3, 2), (2, 1.0, 1), (2, 2.0, 1), (8, 1.0, 7), (8, 7.9, 1), (16, 1.0, 8)],
)
def test_as_many_threads_compute_as_others_leave_cores(cores: int, others: float, threads: int) -> None:
    machine = Machine(cores)
    crew = machine.crew()
    machine.go_on(MEASURE_S, own=cores - others, others=others)
    assert crew.size(most=min(cores, 8)) == threads  # torch takes a thread for each real core, of which these have two


def test_only_the_time_since_the_last_look_counts() -> None:
    machine = Machine(4)
    crew = machine.crew()
    machine.go_on(1000, own=1, others=3)
    assert crew.size(4) == 1
    machine.go_on(MEASURE_S, own=1, others=0)
    assert crew.due()
    assert crew.size(4) == 4
    assert not crew.due()


def test_a_moment_says_nothing_about_others() -> None:
    machine = Machine(4)
    crew = machine.crew()
    machine.go_on(0.01, own=0, others=4)
    assert crew.size(4) == 4


def test_a_quota_leaves_fewer_threads_than_the_machine_has_cores() -> None:
    machine = Machine(64)
    machine.quota = 2.0
    crew = machine.crew()
    assert crew.size(64) == 2, "before anything was measured"
    machine.go_on(MEASURE_S, own=2, others=3)
    assert crew.size(64) == 2


def test_several_workers_share_what_others_leave() -> None:
    machine = Machine(8)
    crew = machine.crew()
    crew.workers = 2
    assert crew.size(8) == 4
    machine.go_on(MEASURE_S, own=4, others=4)  # the other worker
    assert crew.size(8) == 4
    machine.go_on(MEASURE_S, own=3, others=3 + 2)
    assert crew.size(8) == 3


def test_where_the_system_does_not_tell_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_times", mock.Mock(side_effect=PermissionError))
    machine = Machine(0)
    crew = Crew(lambda: machine.now, lambda: machine.own_s, taken, lambda: 1000.0)
    machine.go_on(MEASURE_S, own=1, others=0)
    _, cores = taken()
    assert crew.size(most=cores) == cores


def test_the_time_of_this_machine_is_read() -> None:
    before, cores = taken()
    sum(range(3_000_000))
    after, _ = taken()
    assert cores >= 1
    assert after > before > 0
