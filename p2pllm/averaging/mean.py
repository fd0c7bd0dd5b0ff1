"""The weighted mean of a part, in an arithmetic that is the same on every machine.

float32 throughout, terms in roster order: acc = s_0 * x_0, then acc = acc + (s_i * x_i), every operation
rounded on its own (numpy never fuses a multiply and an add). What does not live here: where terms come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2pllm.averaging.codecs import Floats

_FLOAT32_MAX = np.finfo(np.float32).max


class NotFinite(ValueError):  # noqa: N818 - names what was found
    """Terms that hold NaN or an infinity; `indices` says which."""

    def __init__(self, indices: list[int]) -> None:
        super().__init__(f"Terms {indices} are not finite.")
        self.indices = indices


def weighted_mean(terms: Sequence[Floats], shares: Sequence[np.float32], out: Floats) -> None:
    """Write sum(shares[i] * terms[i]) to `out`; the terms are overwritten.

    terms: float32 (n,) each, in roster order. shares: from Group.shares. out: float32 (n,), no alias of a
    term. Where finite terms at the edge of float32 add up beyond it, the largest finite value is taken.
    Raises NotFinite if a term has a value that is not finite; `out` is then undefined.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for index, (term, share) in enumerate(zip(terms, shares, strict=True)):
            if index == 0:
                np.multiply(term, share, out=out)
            else:
                np.multiply(term, share, out=term)
                np.add(out, term, out=out)
    # One look at the sum instead of one at every term: what is added to NaN or infinity stays so.
    if np.isfinite(out).all():
        return
    # The first term was not overwritten; of the others, a share (0 to 1) keeps or makes what is not finite.
    bad = [index for index, term in enumerate(terms) if not np.isfinite(term).all()]
    if bad:
        raise NotFinite(bad)
    np.clip(out, -_FLOAT32_MAX, _FLOAT32_MAX, out=out)
