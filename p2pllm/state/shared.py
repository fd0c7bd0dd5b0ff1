"""SharedState: what all peers at one head hold bit for bit, and the digest that proves it.

Adopting vectors from a file or from another peer is here too, since both need the same checks. What does not
live here: how the digest comes about (`chunks`), advancing the state (`outer`), files (`snapshot`), sending
(`rounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from p2pllm.errors import StateError
from p2pllm.state.chunks import VECTORS, ChunkPlan
from p2pllm.state.header import parse_header
from p2pllm.state.layout import FLOAT, Layout

_BLOCK = 1 << 18  # elements checked at once, so that the checks need no memory of the state's size


class SharedState:
    """Parameters and moments of the outer optimizer as flat float32 vectors, and where the run stands.

    params, m, v: shape (layout.size,). round: outer steps that were applied. beta1_power, beta2_power: the
    products of the betas over these steps, for bias correction; they are kept by multiplication, because
    pow() differs between math libraries.
    """

    def __init__(
        self,
        layout: Layout,
        params: np.ndarray,
        m: np.ndarray,
        v: np.ndarray,
        *,
        round: int = 0,  # noqa: A002 - the word of the design
        beta_powers: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Take the given arrays as they are: they are written in place, and only `move_params` replaces one.

        Raises StateError if one is not a writable, contiguous float32 vector of `layout.size` elements.
        """
        for name, array in zip(VECTORS, (params, m, v), strict=True):
            _check_vector(name, array, layout)
        self.layout = layout
        self.params, self.m, self.v = params, m, v
        self.round = round
        self.beta1_power, self.beta2_power = beta_powers

    @classmethod
    def initial(cls, layout: Layout, params: np.ndarray) -> SharedState:
        """The state at round 0 with these parameters (kept, not copied) and zero moments.

        Raises StateError if a parameter is not finite or the vector does not fit.
        """
        state = cls(layout, params, np.zeros(layout.size, FLOAT), np.zeros(layout.size, FLOAT))
        _check_values("params", params)
        return state

    def digest(self) -> str:
        """The digest of the state's `ChunkPlan`; 64 hex digits."""
        return ChunkPlan.of(self).digest.hex()

    def header(self) -> dict[str, str | int]:
        """Everything but the vectors: {layout: digest, round, beta1_power, beta2_power as hex floats}."""
        return {
            "layout": self.layout.digest(),
            "round": self.round,
            "beta1_power": self.beta1_power.hex(),
            "beta2_power": self.beta2_power.hex(),
        }

    def payload(self) -> list[memoryview]:
        """The bytes of params, m and v, in this order: views, not copies, of 4 * layout.size bytes each."""
        return [array.view(np.uint8).data for array in (self.params, self.m, self.v)]

    @classmethod
    def adopt(cls, layout: Layout, header: Mapping[str, Any], vectors: Sequence[np.ndarray]) -> SharedState:
        """The state that `header` and `vectors` (params, m, v: kept, not copied) describe.

        Raises StateError if anything is of the wrong type or size, not finite, or impossible. It cannot tell a
        wrong state from the right one: compare `digest()`.
        """
        round_, powers = parse_header(layout, header)
        params, m, v = vectors
        state = cls(layout, params, m, v, round=round_, beta_powers=powers)
        for name, vector in zip(VECTORS, vectors, strict=True):
            _check_values(name, vector, positive=name == "v")
        return state

    @classmethod
    def from_payload(
        cls,
        layout: Layout,
        header: Mapping[str, Any],
        buffers: Sequence[Any],
        params_out: np.ndarray | None = None,
    ) -> SharedState:
        """The state that `header` and `buffers` (params, m, v: bytes-like) describe.

        The vectors are copied; the parameters into `params_out` if it is given, which the state then keeps.
        Raises StateError as `adopt` does, before `params_out` is touched.
        """
        state = cls.adopt(layout, header, _copies_of(buffers, layout))
        if params_out is not None:
            state.move_params(params_out)
        return state

    def move_params(self, out: np.ndarray) -> None:
        """Copy the parameters to `out`, float32 of shape (layout.size,), and keep them there from now on.

        Raises StateError if `out` does not fit.
        """
        _check_vector("params", out, self.layout)
        np.copyto(out, self.params)
        self.params = out


def _check_vector(name: str, array: Any, layout: Layout) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != FLOAT or array.shape != (layout.size,):
        raise StateError(f"The state's {name} is not a float32 vector of {layout.size} elements.")
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise StateError(f"The state's {name} is not a contiguous, writable vector.")


def _copies_of(buffers: Any, layout: Layout) -> list[np.ndarray]:
    if not isinstance(buffers, Sequence) or len(buffers) != len(VECTORS):
        raise StateError(f"A state has the {len(VECTORS)} vectors {', '.join(VECTORS)} and no others.")
    arrays = []
    for name, buffer in zip(VECTORS, buffers, strict=True):
        try:
            raw = memoryview(buffer).cast("B")
        except (TypeError, ValueError):
            raise StateError(f"The state's {name} is not a contiguous run of bytes.") from None
        if raw.nbytes != layout.nbytes:
            raise StateError(f"The state's {name} has {raw.nbytes} bytes instead of {layout.nbytes}.")
        arrays.append(np.frombuffer(bytearray(raw), FLOAT) if raw.nbytes else np.empty(0, FLOAT))
    return arrays


def _check_values(name: str, array: np.ndarray, *, positive: bool = False) -> None:
    for start in range(0, array.size, _BLOCK):
        block = array[start : start + _BLOCK]
        if not np.isfinite(block).all():
            raise StateError(f"The state's {name} holds a number that is not finite.")
        if positive and (block < 0).any():
            raise StateError(f"The state's {name} holds a negative number, which no mean of squares can be.")
