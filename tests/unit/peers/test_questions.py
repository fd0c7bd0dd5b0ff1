"""How long a worker may take over an answer: by how long its steps take."""

from __future__ import annotations

import pytest

from p2pllm_peers.questions import LEAST_S, MOST_S, TIMES, Patience


@pytest.mark.parametrize(
    ("step_s", "expected"), [(0.01, LEAST_S), (130.0, TIMES * 130.0), (1e5, MOST_S)], ids=["quick", "slow", "hung"]
)
def test_a_slow_step_is_waited_for_and_a_hung_one_is_not(step_s: float, expected: float) -> None:
    patience = Patience()
    assert patience.seconds() == MOST_S, "nothing is known yet"
    patience.stepped(step_s, 8)
    assert patience.seconds() == expected > step_s or expected == MOST_S
    patience.stepped(0.001, 8)
    assert patience.seconds() == expected, "the slowest counts"


def test_a_validation_may_take_as_long_as_its_samples() -> None:
    patience = Patience()
    patience.stepped(8.0, 4)
    assert patience.seconds(samples=100) == TIMES * 200.0


def test_what_is_long_past_does_not_count() -> None:
    patience = Patience()
    patience.stepped(100.0, 1)
    for _ in range(20):
        patience.stepped(1.0, 1)
    assert patience.seconds() == LEAST_S
