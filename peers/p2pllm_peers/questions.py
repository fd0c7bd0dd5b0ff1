"""Questions: what was asked over a pipe and is not answered yet, so that each answer finds its question.

What does not live here: the pipe (`worker_process`) and what is asked (`compute`).
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

Event = dict[str, Any]


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
