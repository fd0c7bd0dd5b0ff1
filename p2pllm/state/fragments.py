"""Fragments: which part of the parameters a round averages (Streaming DiLoCo, arXiv 2501.18512).

What does not live here: what peers do with the other parts meanwhile (`training.local`).
"""

from __future__ import annotations

Span = tuple[int, int]
"""First element and the one after the last of a part of the flat vector."""


def span_of(size: int, fragments: int, round: int) -> Span:  # noqa: A002 - the design's word
    """The elements that the step from state `round` moves, of a vector of `size`.

    The fragments take turns. They are cut at equal distances and not between parameters, so that every round sends as
    many bytes.
    """
    turn = round % fragments
    return size * turn // fragments, size * (turn + 1) // fragments
