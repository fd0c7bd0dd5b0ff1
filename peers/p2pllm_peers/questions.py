"""Questions: what was asked over a pipe and is not answered yet, so that each answer finds its question.

Patience is how long an answer may take before who should give it counts as hung.

What does not live here: the pipe (`worker_process`) and what is asked (`compute`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import Any

Event = dict[str, Any]

LEAST_S, MOST_S = 120.0, 3600.0
"""Bounds of a patience; it is the longest while no step was measured."""

TIMES = 10.0
"""Within these an answer may take so many times as long as its work took before."""

_REMEMBERED = 16
"""Steps of which the slowest counts."""


class Patience:
    """With a worker whose steps are seen: a slow machine is not taken for a hung one."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)  # seconds, and seconds a sample

    def stepped(self, seconds: float, samples: int) -> None:
        """A step took so long, and was of so many samples."""
        self._steps.append((seconds, seconds / max(1, samples)))

    def seconds(self, samples: int = 0) -> float:
        """For an answer that waits for the step under way, or for so many samples if that is more."""
        if not self._steps:
            return MOST_S
        work = max(max(step, samples * each) for step, each in self._steps)
        return min(MOST_S, max(LEAST_S, TIMES * work))


class Questions:
    """Numbers what is asked. An answer to a question that nobody waits for any more is dropped."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[Event | None]] = {}

    def put(self) -> tuple[int, asyncio.Future[Event | None]]:
        """The number of a new question, which belongs into what is sent, and its answer: None if none will come."""
        number = next(self._numbers)
        answer: asyncio.Future[Event | None] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        answer.add_done_callback(lambda _: self._open.pop(number, None))
        return number, answer

    def answer(self, number: object, event: Event) -> None:
        """This came for the question of that number."""
        answer = self._open.get(number) if isinstance(number, int) else None
        if answer is not None and not answer.done():
            answer.set_result(event)

    def give_up(self) -> None:
        """Who would answer is gone."""
        for answer in list(self._open.values()):
            if not answer.done():
                answer.set_result(None)
