"""SharedState: what all peers at one head hold bit for bit, and the digest that proves it.

Adopting vectors from a file is here too. What does not live here: how the digest comes about (`chunks`), advancing the
state (`outer`), files (`snapshot`), sending (`rounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from p2pllm.errors import StateError
from p2pllm.state.chunks import ChunkPlan
from p2pllm.state.header import parse_header
from p2pllm.state.layout import FLOAT, Layout

_BLOCK = 1 << 18  # elements checked at once, so that the checks need no memory of the state's size


class SharedState:
    """Parameters and moments of the outer optimizer as flat float32 vectors, and where the run stands.

    params, and each of `moments` under the name that the layout gives it: shape (layout.size,). round: outer steps that
    were applied.
    """

    def __init__(
        self,
        layout: Layout,
        vectors: Sequence[np.ndarray],
        *,
        round: int = 0,  # noqa: A002 - the word of the design
    ) -> None:
        """Take the given arrays, in the order of layout.vectors, as they are: they are written in place.

        Raises StateError if one is not a writable, contiguous float32 vector of `layout.size` elements.
        """
        for name, array in zip(layout.vectors, vectors, strict=True):
            _check_vector(name, array, layout)
        self.layout = layout
        self.params, *moments = vectors
        self.moments: dict[str, np.ndarray] = dict(zip(layout.moments, moments, strict=True))
        self.round = round

    @classmethod
    def initial(cls, layout: Layout, params: np.ndarray) -> SharedState:
        """The state at round 0 with these parameters (kept, not copied) and zero moments.

        Raises StateError if a parameter is not finite or the vector does not fit.
        """
        state = cls(layout, [params, *(np.zeros(layout.size, FLOAT) for _ in layout.moments)])
        _check_values("params", params)
        return state

    def digest(self) -> str:
        """The digest of the state's `ChunkPlan`; 64 hex digits."""
        return ChunkPlan.of(self).digest.hex()

    def header(self) -> dict[str, str | int]:
        """Everything but the vectors: {layout: digest, round}."""
        return {"layout": self.layout.digest(), "round": self.round}

    @property
    def vectors(self) -> list[np.ndarray]:
        """params and the moments, in the order of layout.vectors."""
        return [self.params, *self.moments.values()]

    def payload(self) -> list[memoryview]:
        """The bytes of all vectors, in their order: views, not copies, of 4 * layout.size bytes each."""
        return [array.view(np.uint8).data for array in self.vectors]

    def copy_from(self, other: SharedState) -> None:
        """Become the same, in our own memory. Both have one layout."""
        for mine, its in zip(self.vectors, other.vectors, strict=True):
            np.copyto(mine, its)
        self.round = other.round

    @classmethod
    def adopt(cls, layout: Layout, header: Mapping[str, Any], vectors: Sequence[np.ndarray]) -> SharedState:
        """The state that `header` and `vectors` (params and moments: kept, not copied) describe.

        Raises StateError if anything is of the wrong type or size, not finite, or impossible. It cannot tell a
        wrong state from the right one: compare `digest()`.
        """
        state = cls(layout, vectors, round=parse_header(layout, header))
        for name, vector in zip(layout.vectors, vectors, strict=True):
            _check_values(name, vector, positive=name == "v")
        return state


def _check_vector(name: str, array: Any, layout: Layout) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != FLOAT or array.shape != (layout.size,):
        raise StateError(f"The state's {name} is not a float32 vector of {layout.size} elements.")
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise StateError(f"The state's {name} is not a contiguous, writable vector.")


def _check_values(name: str, array: np.ndarray, *, positive: bool = False) -> None:
    for start in range(0, array.size, _BLOCK):
        block = array[start : start + _BLOCK]
        if not np.isfinite(block).all():
            raise StateError(f"The state's {name} holds a number that is not finite.")
        if positive and (block < 0).any():
            raise StateError(f"The state's {name} holds a negative number, which no mean of squares can be.")
