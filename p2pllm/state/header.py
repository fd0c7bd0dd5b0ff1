"""The header of a state: all of it but the vectors, and which headers are refused.

What does not live here: the state itself (`shared`), the digests of its vectors (`chunks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pllm.errors import StateError
from p2pllm.state.layout import Layout

MAX_ROUND = 10**9
"""Bound on the round number of a state that is adopted; a manifest allows no more rounds."""

_KEYS = {"layout", "round"}


def lines_of(header: Mapping[str, str | int]) -> str:
    """The header as it goes into the digest of a state: key=value lines, sorted, each with its newline."""
    return "".join(f"{key}={value}\n" for key, value in sorted(header.items()))


def parse_header(layout: Layout, header: Any) -> int:
    """The round of a header as SharedState.header gives it.

    Raises StateError if it is of another layout, says anything else or spells it in another way.
    """
    if not isinstance(header, Mapping) or set(header) != _KEYS:
        raise StateError(f"The header of a state does not hold exactly {', '.join(sorted(_KEYS))}.")
    round_ = header["round"]
    if type(round_) is not int or not 0 <= round_ <= MAX_ROUND:
        raise StateError(f"The header of a state gives a round that is no number from 0 to {MAX_ROUND}.")
    if header["layout"] != layout.digest():
        raise StateError("A state has another layout than this run's model.")
    return round_
