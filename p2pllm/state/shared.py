"""SharedState: what all peers at one head hold bit for bit, and the digest that proves it.

Adopting bytes from a file or from another peer is here too, since both need the same checks. What does not
live here: advancing the state (`outer`), files (`snapshot`), sending (`rounds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from blake3 import blake3

from p2pllm.errors import StateError
from p2pllm.state.layout import Layout

FLOAT = np.dtype("<f4")
"""Element type of every flat vector; little-endian by name, so that its bytes are the same anywhere."""

MAX_ROUND = 10**9
"""Bound on the round number of a state that is adopted; a manifest allows no more rounds."""

_MANY_BYTES = 1 << 20  # below this, waking threads costs more than hashing
_BLOCK = 1 << 18  # elements checked at once, so that the checks need no memory of the state's size
_HEADER_KEYS = {"layout", "round", "beta1_power", "beta2_power"}
_VECTORS = ("params", "m", "v")


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
        """Take the given arrays as they are: they are written in place and never replaced.

        Raises StateError if one is not a writable, contiguous float32 vector of `layout.size` elements.
        """
        for name, array in zip(_VECTORS, (params, m, v), strict=True):
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
        """BLAKE3 over the header and the bytes of params, m and v; 64 hex digits."""
        header = "\n".join(f"{key}={value}" for key, value in sorted(self.header().items()))
        many = self.params.nbytes >= _MANY_BYTES
        hasher = blake3(f"p2pllm state 1\n{header}\n".encode(), max_threads=blake3.AUTO if many else 1)
        for buffer in self.payload():
            hasher.update(buffer)
        return str(hasher.hexdigest())

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
    def from_payload(
        cls,
        layout: Layout,
        header: Mapping[str, Any],
        buffers: Sequence[Any],
        params_out: np.ndarray | None = None,
    ) -> SharedState:
        """The state that `header` and `buffers` (params, m, v: bytes-like) describe.

        The vectors are copied; the parameters into `params_out` if it is given, which the state then keeps.
        Raises StateError if anything is of the wrong type or size, not finite, or impossible, before
        `params_out` is touched. It cannot tell a wrong state from the right one: compare `digest()`.
        """
        round_, powers = _parse_header(layout, header)
        arrays = _parse_buffers(layout, buffers)
        if params_out is None:
            params_out = np.empty(layout.size, FLOAT)
        else:
            _check_vector("params", params_out, layout)
        np.copyto(params_out, arrays[0])
        return cls(layout, params_out, arrays[1].copy(), arrays[2].copy(), round=round_, beta_powers=powers)


def _check_vector(name: str, array: Any, layout: Layout) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != FLOAT or array.shape != (layout.size,):
        raise StateError(f"The state's {name} is not a float32 vector of {layout.size} elements.")
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise StateError(f"The state's {name} is not a contiguous, writable vector.")


def _parse_header(layout: Layout, header: Any) -> tuple[int, tuple[float, float]]:
    if not isinstance(header, Mapping) or set(header) != _HEADER_KEYS:
        raise StateError(f"The header of a state does not hold exactly {', '.join(sorted(_HEADER_KEYS))}.")
    round_ = header["round"]
    if type(round_) is not int or not 0 <= round_ <= MAX_ROUND:
        raise StateError(f"The header of a state gives a round that is no number from 0 to {MAX_ROUND}.")
    if header["layout"] != layout.digest():
        raise StateError("A state has another layout than this run's model.")
    powers = _parse_power(header["beta1_power"]), _parse_power(header["beta2_power"])
    if round_ == 0 and powers != (1.0, 1.0):
        raise StateError("A state at round 0 claims outer steps that were not made.")
    return round_, powers


def _parse_power(value: Any) -> float:
    try:
        power = float.fromhex(value) if isinstance(value, str) and len(value) <= 32 else math.nan
    except (ValueError, OverflowError):
        power = math.nan
    # another spelling of the same number would make another digest
    if not 0.0 <= power <= 1.0 or power.hex() != value:
        raise StateError("The header of a state gives a beta power that is no hex float from 0 to 1.")
    return power


def _parse_buffers(layout: Layout, buffers: Any) -> list[np.ndarray]:
    if not isinstance(buffers, Sequence) or len(buffers) != len(_VECTORS):
        raise StateError(f"A state has the {len(_VECTORS)} vectors {', '.join(_VECTORS)} and no others.")
    arrays = []
    for name, buffer in zip(_VECTORS, buffers, strict=True):
        try:
            raw = memoryview(buffer).cast("B")
        except (TypeError, ValueError):
            raise StateError(f"The state's {name} is not a contiguous run of bytes.") from None
        if raw.nbytes != FLOAT.itemsize * layout.size:
            raise StateError(f"The state's {name} has {raw.nbytes} bytes instead of {FLOAT.itemsize * layout.size}.")
        array = np.frombuffer(raw, FLOAT) if raw.nbytes else np.empty(0, FLOAT)
        _check_values(name, array, positive=name == "v")
        arrays.append(array)
    return arrays


def _check_values(name: str, array: np.ndarray, *, positive: bool = False) -> None:
    for start in range(0, array.size, _BLOCK):
        block = array[start : start + _BLOCK]
        if not np.isfinite(block).all():
            raise StateError(f"The state's {name} holds a number that is not finite.")
        if positive and (block < 0).any():
            raise StateError(f"The state's {name} holds a negative number, which no mean of squares can be.")
