"""The throttle: what a peer takes comes to what is allowed, however long its steps are."""

from __future__ import annotations

import asyncio
import random

import pytest

from p2pllm_peers import throttle
from p2pllm_peers.rest import Rest
from p2pllm_peers.throttle import LEAST, MEASURE_S, Feedback, Throttle

TICK_S = 0.01


class Machine:
    """A worker that takes `full` cores while it computes, steps of `step_s` seconds, and the rest of its peer."""

    def __init__(self, allowed: float, full: float, others: float, step_s: float = 0.05) -> None:
        self.allowed, self.full, self.others, self.step_s = allowed, full, others, step_s
        self.now = self.worker_s = 0.0
        self.feedback = Feedback(allowed)
        self.rest = Rest(lambda: self.now, lambda: self.worker_s)
        self.rest.cores = self.feedback.cores
        self._draw = random.Random(1)
        self._measured = self._counted = 0.0

    def run(self, seconds: float, idle: bool = False) -> float:
        """Cores taken on average."""
        end, worker_s, others_s = self.now + seconds, self.worker_s, 0.0
        while self.now < end:
            if idle or self.rest.left():
                self.now += TICK_S
            else:
                began, length = self.now, self.step_s * self._draw.uniform(0.67, 1.33)
                while self.now < began + length:  # it is told while it computes
                    self.now += TICK_S
                    self.worker_s += self.full * TICK_S
                    others_s += self._measure()
                self.rest.stepped(began)
            others_s += self._measure()
        return (self.worker_s - worker_s + others_s) / seconds

    def _measure(self) -> float:
        """What the others took, whenever it is time to tell the worker anew."""
        if (wall_s := self.now - self._measured) < MEASURE_S:
            return 0.0
        others_s = self.others * wall_s * self._draw.uniform(0.5, 1.5)
        self.rest.cores = self.feedback.update(self.allowed, self.worker_s - self._counted, others_s, wall_s)
        self._measured, self._counted = self.now, self.worker_s
        return others_s


@pytest.mark.parametrize("allowed", [0.2, 0.5, 1.6])
@pytest.mark.parametrize(("full", "others"), [(2.0, 0.05), (7.5, 0.1)])
@pytest.mark.parametrize("step_s", [0.05, 1.0, 5.0])
def test_what_is_taken_comes_to_what_is_allowed(allowed: float, full: float, others: float, step_s: float) -> None:
    machine = Machine(allowed, full, others, step_s)
    machine.run(600)
    assert machine.run(6000) == pytest.approx(allowed, rel=0.08)


def test_it_follows_a_new_limit_and_a_new_speed() -> None:
    machine = Machine(1.0, 2.0, 0.05)
    machine.run(180)
    machine.allowed = 0.4
    assert machine.run(180) == pytest.approx(0.4, rel=0.05)
    machine.full = 1.0
    assert machine.run(180) == pytest.approx(0.4, rel=0.05)


def test_a_rest_ends_when_more_is_allowed() -> None:
    machine = Machine(0.1, 2.0, 0.0, step_s=10.0)
    machine.run(60)
    assert machine.rest.left() > 50
    machine.rest.cores = None
    assert machine.rest.left() == 0


def test_a_share_of_the_time_holds_for_steps_of_any_length() -> None:
    machine = Machine(2.0, 2.0, 0.0, step_s=5.0)
    machine.rest.share = 0.1
    assert machine.run(6000) == pytest.approx(0.2, rel=0.05)


def test_waiting_is_no_credit_for_long() -> None:
    machine = Machine(0.5, 2.0, 0.05)
    machine.run(60)
    machine.run(3600, idle=True)
    assert machine.run(180) <= 0.5 + 0.5 * 20 / 180 + 0.03


def test_the_first_moment_is_limited_too() -> None:
    assert Feedback(0.5).cores == 0.5


def test_a_limit_that_the_rest_alone_exceeds_leaves_the_worker_little() -> None:
    machine = Machine(0.1, 2.0, 0.3)
    machine.run(60)
    assert machine.feedback.cores == pytest.approx(LEAST * 0.1)


def test_a_worker_that_cannot_reach_the_limit_runs_free() -> None:
    machine = Machine(1.9, 1.0, 0.05)
    assert machine.run(60) == pytest.approx(1.05, rel=0.03)


def test_a_daemon_that_takes_nearly_all_leaves_the_worker_the_rest() -> None:
    machine = Machine(0.1, 2.0, 0.095)
    machine.run(600)
    assert machine.run(6000) == pytest.approx(0.1, rel=0.03)


async def test_a_share_of_the_time_is_told_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "MEASURE_S", 0.001)
    told: asyncio.Queue[tuple[float, float | None]] = asyncio.Queue()

    async def tell(share: float, cores: float | None) -> None:
        await told.put((share, cores))

    limit = Throttle(frozenset, tell)
    task = asyncio.create_task(limit.run())
    limit.duty_percent = 25.0
    assert await told.get() == (0.25, None)
    limit.duty_percent = 100.0
    assert await told.get() == (1.0, None)
    task.cancel()


async def test_a_look_that_fails_does_not_end_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "MEASURE_S", 0.001)
    looks: list[str] = []
    told_after = asyncio.Event()

    async def tell(share: float, cores: float | None) -> None:
        if "failed" in looks:
            told_after.set()

    def taken() -> tuple[float, float]:
        if looks == ["done"]:
            looks.append("failed")
            raise OSError(24, "Too many open files")
        looks.append("done")
        return 0.0, 0.0

    limit = Throttle(frozenset, tell)
    limit.cpu_percent = 50.0
    monkeypatch.setattr(limit, "_taken", taken)
    task = asyncio.create_task(limit.run())
    async with asyncio.timeout(10):
        await told_after.wait()
    task.cancel()
