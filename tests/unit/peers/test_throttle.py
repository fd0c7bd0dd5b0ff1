"""The throttle's feedback: what is taken comes to what is allowed, whatever the worker and the rest need."""

from __future__ import annotations

import asyncio
import random

import pytest

from p2pllm_peers import throttle
from p2pllm_peers.throttle import LEAST_SHARE, MEASURE_S, Feedback, Throttle


def taken(feedback: Feedback, allowed: float, full: float, others: float, seconds: float, seed: int = 1) -> float:
    """Cores taken on average by a worker that takes `full` cores while it computes, give or take a third."""
    draw = random.Random(seed)
    total, share = 0.0, feedback.share
    for _ in range(int(seconds / MEASURE_S)):
        worker_s = full * share * MEASURE_S * draw.uniform(0.67, 1.33)
        others_s = others * MEASURE_S * draw.uniform(0.5, 1.5)
        total += worker_s + others_s
        share = feedback.update(allowed, worker_s, others_s, MEASURE_S)
    return total / seconds


@pytest.mark.parametrize("allowed", [0.2, 0.5, 1.0, 1.6])
@pytest.mark.parametrize(("full", "others"), [(2.0, 0.05), (1.8, 0.1), (7.5, 0.1)])
def test_what_is_taken_comes_to_what_is_allowed(allowed: float, full: float, others: float):
    assert taken(Feedback(allowed, 8.0), allowed, full, others, 180) == pytest.approx(allowed, rel=0.05)


def test_it_follows_a_new_limit_and_a_new_speed():
    feedback = Feedback(1.0, 8.0)
    taken(feedback, 1.0, 2.0, 0.05, 180)
    assert taken(feedback, 0.4, 2.0, 0.05, 180) == pytest.approx(0.4, rel=0.05)
    assert taken(feedback, 0.4, 1.0, 0.05, 180) == pytest.approx(0.4, rel=0.05)


def test_waiting_is_no_credit_for_long():
    feedback = Feedback(0.5, 8.0)
    taken(feedback, 0.5, 2.0, 0.05, 60)
    taken(feedback, 0.5, 0.0, 0.05, 3600)
    assert taken(feedback, 0.5, 2.0, 0.05, 180) <= 0.5 + 0.5 * 20 / 180 + 0.03


def test_the_first_moment_is_limited_too():
    assert Feedback(0.5, 8.0).share == 0.5 / 8.0


def test_a_limit_that_the_rest_alone_exceeds_leaves_the_worker_little():
    feedback = Feedback(0.1, 8.0)
    taken(feedback, 0.1, 2.0, 0.3, 60)
    assert feedback.share == LEAST_SHARE


def test_a_worker_that_cannot_reach_the_limit_runs_free():
    feedback = Feedback(1.9, 8.0)
    taken(feedback, 1.9, 1.0, 0.05, 60)
    assert feedback.share == 1.0


async def test_a_share_of_the_time_is_told_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "MEASURE_S", 0.001)
    told: asyncio.Queue[float] = asyncio.Queue()
    limit = Throttle(frozenset, told.put)
    task = asyncio.create_task(limit.run())
    limit.duty_percent = 25.0
    assert await told.get() == 0.25
    limit.duty_percent = 100.0
    assert await told.get() == 1.0
    task.cancel()
