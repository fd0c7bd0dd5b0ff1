"""Layout: where each parameter lies in a flat vector.

It is part of a run's identity: two peers with different layouts cannot share a state. What does not live
here: the vectors themselves (`shared`) and reading them out of a model (`training.model`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from p2pllm.errors import StateError

FLOAT = np.dtype("<f4")
"""Element type of every flat vector; little-endian by name, so that its bytes are the same anywhere."""


class Entry(NamedTuple):
    """One parameter: its name, its shape, and the index of its first element in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


MOMENTS = ("m", "v")
"""Those of AdamW."""


@dataclass(frozen=True)
class Layout:
    """Parameters one after another, C order, without gaps. Build it with `of` or `from_json`.

    moments: names of the vectors that the outer optimizer keeps beside the parameters, each as long as they are.
    """

    entries: tuple[Entry, ...]
    moments: tuple[str, ...] = MOMENTS

    @classmethod
    def of(cls, named_shapes: Iterable[tuple[str, tuple[int, ...]]], moments: tuple[str, ...] = MOMENTS) -> Layout:
        """Lay out parameters in the given order.

        Raises StateError if a name comes twice or a dimension is negative.
        """
        entries: list[Entry] = []
        offset = 0
        for name, shape in named_shapes:
            entry = Entry(name, tuple(int(side) for side in shape), offset)
            if any(side < 0 for side in entry.shape):
                raise StateError(f"The layout gives {name} the impossible shape {entry.shape}.")
            entries.append(entry)
            offset += entry.size
        if len({entry.name for entry in entries}) != len(entries):
            raise StateError("The layout names a parameter twice.")
        return cls(tuple(entries), moments)

    def with_moments(self, moments: tuple[str, ...]) -> Layout:
        """The same parameters for another outer optimizer."""
        return replace(self, moments=moments)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of all vectors of a state, in the order of its chunks."""
        return ("params", *self.moments)

    @property
    def size(self) -> int:
        """Elements of a flat vector."""
        return self.entries[-1].offset + self.entries[-1].size if self.entries else 0

    @property
    def nbytes(self) -> int:
        """Bytes of a flat vector."""
        return FLOAT.itemsize * self.size

    def digest(self) -> str:
        """BLAKE3 of the JSON form, 64 hex digits."""
        return str(blake3(self.to_json().encode()).hexdigest())

    def to_json(self) -> str:
        """The one JSON form of the parameters: a list of [name, shape]; offsets follow from it."""
        return json.dumps([[entry.name, list(entry.shape)] for entry in self.entries], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout that `to_json` wrote. Raises StateError for anything else."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise StateError("The layout is not valid JSON.") from None
        if not isinstance(raw, list) or not all(_is_pair(item) for item in raw):
            raise StateError("The layout is not a list of names and shapes.")
        return cls.of((name, tuple(shape)) for name, shape in raw)

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Each parameter as a view in its own shape of `flat`, a vector of `size` elements; no copies.

        Raises StateError if `flat` has another shape.
        """
        if flat.shape != (self.size,):
            raise StateError(f"A flat vector has the shape {flat.shape}, but its layout has {self.size} elements.")
        return {
            entry.name: flat[entry.offset : entry.offset + entry.size].reshape(entry.shape) for entry in self.entries
        }


def _is_pair(item: Any) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], list)
        and all(type(side) is int for side in item[1])
    )
