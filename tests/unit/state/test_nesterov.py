"""SGD as the outer optimizer: against torch's, its bits, and states that have no more vectors than it needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blake3 import blake3

from p2pllm.errors import StateError
from p2pllm.manifest import RunDraft
from p2pllm.sections import OuterSection
from p2pllm.state import FLOAT, AdamW, Layout, Nesterov, Sgd, SharedState, moments_of, outer_optimizer, span_of
from p2pllm.state.outer import OuterOptimizer, falling

PARAMETERS = [("bias", (7,)), ("weight", (9, 11)), ("deep", (2, 3, 4))]
ROUNDS = 9


def made(momentum: float, block: int = 1 << 15) -> tuple[OuterOptimizer, SharedState]:
    section = OuterSection(learning_rate=0.7, momentum=momentum, final_fraction=0.25)
    kind = Nesterov if momentum else Sgd
    layout = Layout.of(PARAMETERS, kind.moments)
    params = (np.random.default_rng(1).integers(-4096, 4096, layout.size) / 2048).astype(FLOAT)
    return kind(section, ROUNDS, layout, block), SharedState.initial(layout, params)


def updates(size: int) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    return [(random.integers(-4096, 4096, size) / 65536).astype(FLOAT) for _ in range(ROUNDS)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_torchs(momentum: float) -> None:
    optimizer, state = made(momentum)
    tensor = torch.tensor(state.params, requires_grad=True)
    theirs = torch.optim.SGD([tensor], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for round_, update in enumerate(updates(state.layout.size)):
        theirs.param_groups[0]["lr"] = falling(0.7, 0.25, 0, ROUNDS, round_)
        tensor.grad = torch.tensor(update)
        theirs.step()
        optimizer.step(state, update)
    np.testing.assert_allclose(state.params, tensor.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apart", [False, True])
def test_a_fragment_moves_as_the_whole_would_and_the_rest_stays(apart: bool) -> None:
    """Momentum included. Fragments do not end where parameters do."""
    optimizer, state = made(0.9)
    layout, size = state.layout, state.layout.size
    cut = Nesterov(OuterSection(learning_rate=0.7, momentum=0.9, final_fraction=0.25), ROUNDS, layout, 8, fragments=4)
    whole = SharedState(layout, [vector.copy() for vector in state.vectors])
    for round_, update in enumerate(updates(size)):
        first, last = span_of(size, 4, round_)
        before = [vector.copy() for vector in state.vectors]
        whole = SharedState(layout, [vector.copy() for vector in state.vectors], round=round_)
        optimizer.step(whole, update)
        if apart:
            into = SharedState.initial(layout, np.full(size, 9.0, FLOAT))
            cut.step(state, update[first:last], into)
            state = into
        else:
            cut.step(state, update[first:last])
        for vector, other, old in zip(state.vectors, whole.vectors, before, strict=True):
            assert np.array_equal(vector[first:last], other[first:last])
            assert np.array_equal(vector[:first], old[:first]) and np.array_equal(vector[last:], old[last:])
    assert state.round == ROUNDS
    with pytest.raises(StateError, match="must be float32"):
        cut.step(state, updates(size)[0])


@pytest.mark.parametrize(
    ("momentum", "digest"),
    [
        (0.0, "f898ed1237435d9424b8a4a513132816303deec163c196d36fa95cd654732419"),
        (0.9, "d4b8cc68fc5d09f430ef11a3dd71c03f060e2bb07d39f139ed223efa24c85b1c"),
    ],
)
def test_the_bits_never_change(momentum: float, digest: str) -> None:
    """All peers must compute these; a new value here is a new format of runs."""
    optimizer, state = made(momentum)
    for update in updates(state.layout.size):
        optimizer.step(state, update)
    assert blake3(b"".join(map(bytes, state.payload()))).hexdigest() == digest


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("block", [1, 13, 1 << 15])
def test_blocks_and_another_state_give_the_same_bits(momentum: float, block: int) -> None:
    (optimizer, state), (cut, other) = made(momentum), made(momentum, block)
    into = SharedState(other.layout, [np.full(other.layout.size, np.nan, FLOAT) for _ in other.layout.vectors])
    for update in updates(state.layout.size):
        optimizer.step(state, update)
        cut.step(other, update, into=into)
        other, into = into, other
    assert state.digest() == other.digest()


def test_a_state_has_what_its_optimizer_needs_and_no_more() -> None:
    momentum, plain = made(0.9)[1], made(0.0)[1]
    assert momentum.layout.vectors == ("params", "momentum")
    assert plain.layout.vectors == ("params",) and len(plain.payload()) == 1
    with pytest.raises(StateError, match="another layout"):
        made(0.9)[0].step(plain, updates(plain.layout.size)[0])
    with pytest.raises(StateError, match="keeps"):
        Sgd(OuterSection(), ROUNDS, Layout.of(PARAMETERS))


def test_the_run_file_says_which_one() -> None:
    for strategy, momentum, kind in (("sync", 0.9, AdamW), ("diloco", 0.9, Nesterov), ("sparse_loco", 0.0, Sgd)):
        draft = RunDraft.model_validate({"round": {"strategy": strategy}})
        optimizer = outer_optimizer(draft, Layout.of(PARAMETERS, moments_of(draft)))
        assert type(optimizer) is kind and draft.outer.momentum == momentum
    plain = RunDraft.model_validate({"round": {"strategy": "diloco"}, "outer": {"momentum": 0}})
    assert moments_of(plain) == () and plain.outer.learning_rate == 0.7
