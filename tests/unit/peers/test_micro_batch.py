"""How many samples are computed at once: halved for want of memory, tried again later, and what a user hears of it."""

from __future__ import annotations

import pytest

from p2pllm_peers.micro_batch import AGAIN_S, Kept, MicroBatch


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def measured(size: int, chosen: int = 0) -> tuple[MicroBatch, Clock]:
    clock = Clock()
    micro_batch = MicroBatch(chosen, clock)
    assert micro_batch.start(Kept()) == chosen
    micro_batch.found(size)
    return micro_batch, clock


@pytest.mark.parametrize("chosen", [0, 8])
def test_it_is_halved_and_the_user_is_told(chosen: int) -> None:
    micro_batch, _ = measured(8, chosen)
    assert micro_batch.notice == ""
    assert micro_batch.killed() and micro_batch.size == 4
    assert micro_batch.notice == (
        "The system ended the compute process for want of memory, so it goes on with a micro-batch of 4 instead of 8; "
        "see `p2pllm explain memory`."
    )
    assert micro_batch.killed() and micro_batch.killed() and micro_batch.size == 1
    assert not micro_batch.killed(), "there is nothing smaller"
    assert micro_batch.size == 1 and "1, the smallest there is" in micro_batch.notice


def test_one_that_dies_over_a_measurement_goes_on_with_what_it_had_measured() -> None:
    micro_batch = MicroBatch(0, Clock())
    for size in (1, 2, 4, 8, 16):
        micro_batch.trying(size)
    assert micro_batch.killed() and micro_batch.size == 8
    micro_batch.found(8)
    assert "8 instead of 16" in micro_batch.notice


def test_one_that_dies_before_it_has_measured_measures_again() -> None:
    micro_batch = MicroBatch(0, Clock())
    assert not micro_batch.killed() and micro_batch.size == 0
    assert "started again" in micro_batch.notice


@pytest.mark.parametrize("chosen", [0, 8])
def test_what_was_wanted_is_tried_again_after_a_while(chosen: int) -> None:
    micro_batch, clock = measured(8, chosen)
    assert micro_batch.due() is None
    micro_batch.killed()
    assert micro_batch.due() is None
    clock.now += AGAIN_S
    assert micro_batch.due() == {"do": "fit", "micro_batch": chosen}
    assert micro_batch.due() is None, "it is under way"
    micro_batch.trying(8)
    micro_batch.killed()
    assert micro_batch.size == 4
    clock.now += AGAIN_S
    assert micro_batch.due() is not None
    micro_batch.again(8)
    assert micro_batch.size == 8 and micro_batch.notice == ""
    clock.now += AGAIN_S
    assert micro_batch.due() is None


def test_the_next_start_keeps_what_memory_forced_for_a_while_only() -> None:
    micro_batch, clock = measured(8)
    assert micro_batch.kept == Kept(8, 0.0)
    micro_batch.shrunk(4)
    assert "no memory left" in micro_batch.notice
    kept = micro_batch.kept
    assert kept == Kept(4, clock.now + AGAIN_S)
    soon = MicroBatch(0, clock)
    assert soon.start(kept) == 4 and soon.kept == kept and "micro-batch of 4" in soon.notice
    clock.now += AGAIN_S
    assert soon.due() is not None
    assert MicroBatch(0, clock).start(kept) == 0, "it is measured anew"
    assert MicroBatch(0, clock).start(Kept(8, 0.0)) == 8, "what was measured stays"


def test_what_the_user_chose_is_nothing_to_remember() -> None:
    micro_batch, clock = measured(8, chosen=8)
    micro_batch.killed()
    assert micro_batch.kept == Kept()
    assert MicroBatch(8, clock).start(Kept(2, clock.now + 1)) == 8
