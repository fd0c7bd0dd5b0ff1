"""Forms of aggregates: what everybody makes of the bytes that a record names, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3

from p2pllm.averaging.form import DenseForm, SparseForm, Term
from p2pllm.state import Layout

LAYOUT = Layout.of([("matrix", (128, 64))])  # two tiles, of which an update sends 64 elements each


def test_an_element_is_divided_by_the_weight_of_those_who_sent_it() -> None:
    """Each of the two has its large elements elsewhere; where one alone sent, its value is the mean."""
    form = SparseForm(LAYOUT)
    vectors = [np.zeros(LAYOUT.size, np.float32) for _ in range(2)]
    vectors[0][:100], vectors[1][50:150] = 1.0, 1.0
    payloads = [form.codec.encode(vector) for vector in vectors]
    terms = [Term(weight, blake3(payload).digest()) for weight, payload in zip((1, 3), payloads, strict=True)]
    sent = [form.codec.decode(payload) for payload in payloads]
    mean = form.vector(form.pack(payloads), terms, 0)
    for update in sent:
        (alone,) = (np.setdiff1d(update.positions, other.positions) for other in sent if other is not update)
        assert alone.size
        assert np.array_equal(mean[alone], update.values[np.isin(update.positions, alone)])


def test_what_an_exchange_decoded_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    form, random = SparseForm(LAYOUT), np.random.default_rng(0)
    payloads = [form.codec.encode(random.standard_normal(LAYOUT.size).astype(np.float32)) for _ in range(3)]
    terms = [Term(1, blake3(payload).digest()) for payload in payloads]
    aggregate = form.pack(payloads)
    plain = form.vector(aggregate, terms, 0)
    decoded: list[bytes] = []
    decode = form.codec.decode
    monkeypatch.setattr(form.codec, "decode", lambda payload: decoded.append(payload) or decode(payload))
    assert form.refusals([payloads[0], b"nonsense", payloads[2]]).keys() == {1}
    decoded.clear()
    assert np.array_equal(form.vector(aggregate, terms, 0), plain)
    assert decoded == [payloads[1]]
    form.vector(aggregate, terms, 0)
    assert decoded == [payloads[1], *payloads], "nothing is kept longer than for one aggregate"


@pytest.mark.parametrize(("round_", "size"), [(0, 2730), (1, 2731), (2, 2731), (3, 2730)])
def test_a_dense_aggregate_is_that_of_the_rounds_fragment(round_: int, size: int) -> None:
    form = DenseForm(LAYOUT, fragments=3)
    assert form.max_bytes(5) == 4 * 2731
    aggregate = np.arange(size, dtype=np.float32).tobytes()
    assert np.array_equal(form.vector(aggregate, [], round_), np.arange(size))
    with pytest.raises(ValueError, match=f"an aggregate of {size} values does not have"):
        form.vector(aggregate + bytes(4), [], round_)
