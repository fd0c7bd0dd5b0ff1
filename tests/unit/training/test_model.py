"""Models from manifests, their flat vectors, and every sentence for a manifest that makes no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from p2pllm.errors import ManifestError, SettingsError, StateError
from p2pllm.manifest import RunDraft
from p2pllm.state import FLOAT
from p2pllm.training.device import choose_device, is_out_of_memory
from p2pllm.training.model import (
    build,
    context_length,
    initial_state,
    layout_of,
    read_params,
    write_params,
)
from p2pllm.training.tokenizer import ByteTokenizer

WithModel = Callable[..., RunDraft]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_seed_makes_the_same_weights_and_leaves_the_global_generator_alone(
    draft: RunDraft, tokenizer: ByteTokenizer
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = initial_state(draft, tokenizer)
    assert torch.equal(torch.rand(1), expected)
    assert initial_state(draft, tokenizer).digest() == first.digest()
    other = draft.model_copy(update={"seed": 1})
    assert initial_state(other, tokenizer).digest() != first.digest()


def test_what_is_not_given_is_filled_in(draft: RunDraft, tokenizer: ByteTokenizer) -> None:
    model: Any = build(draft, tokenizer)
    assert model.training
    assert (model.config.vocab_size, model.config.eos_token_id) == (257, 256)
    assert context_length(model) == model.config.max_position_embeddings == 16
    assert model.model.embed_tokens.padding_idx is None, "an embedding learns nothing at a padding id"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_is_given_is_kept(with_model: WithModel, tokenizer: ByteTokenizer) -> None:
    model: Any = build(with_model("llama", **SMALL, intermediate_size=48, vocab_size=300, rope_theta=77.0), tokenizer)
    assert model.get_output_embeddings().weight.shape == (300, 32)
    assert model.config.rope_parameters["rope_theta"] == 77.0


@pytest.mark.parametrize(
    ("kind", "config", "positions"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, 16),
        ("gpt2", {**SMALL, "n_positions": 64}, 64),
        ("qwen3", {**SMALL, "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16}, 16),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, None),
        ("bert", {**SMALL, "intermediate_size": 48, "is_decoder": True}, 16),
    ],
)
def test_other_architectures(
    with_model: WithModel, tokenizer: ByteTokenizer, kind: str, config: dict[str, Any], positions: int | None
) -> None:
    model = build(with_model(kind, **config), tokenizer)
    assert context_length(model) == positions
    check_vectors(model)


def test_tied_weights_count_once(draft: RunDraft, with_model: WithModel, tokenizer: ByteTokenizer) -> None:
    tied = build(draft, tokenizer)
    untied = build(with_model("llama", **{**draft.model.config, "tie_word_embeddings": False}), tokenizer)
    assert layout_of(untied).size - layout_of(tied).size == 257 * 32
    check_vectors(tied)


def check_vectors(model: torch.nn.Module) -> None:
    """What is written is what is read, bit for bit, also from a read-only vector."""
    layout = layout_of(model)
    values = np.random.default_rng(0).standard_normal(layout.size).astype(FLOAT)
    values.flags.writeable = False
    write_params(model, values)
    out = np.zeros(layout.size, FLOAT)
    read_params(model, out)
    assert np.array_equal(out, values)


def test_vectors_that_do_not_fit_are_refused(draft: RunDraft, tokenizer: ByteTokenizer) -> None:
    model = build(draft, tokenizer)
    size = layout_of(model).size
    for flat in (np.zeros(size + 1, FLOAT), np.zeros(size, np.float64)):
        with pytest.raises(StateError):
            write_params(model, flat)
        with pytest.raises(StateError):
            read_params(model, flat)


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("lama", {}, r"did you mean llama"),
        ("t5", {}, "not a causal language model"),
        ("vit", {}, "not a causal language model"),
        ("gemma3", {}, "made of several models"),
        ("bert", {**SMALL, "intermediate_size": 48}, "is_decoder = true"),
        (
            "llama",
            {**SMALL, "hiden_size": 3},
            r"model.config.hiden_size is not a setting.*did you mean hidden_size",
        ),
        ("llama", {**SMALL, "dtype": "float16"}, "model.config.dtype is not a setting"),
        ("llama", {**SMALL, "hidden_size": "big"}, "hidden_size"),
        ("llama", {**SMALL, "num_attention_heads": 5}, "not a multiple|divisible|must be"),
        ("llama", {**SMALL, "hidden_act": "foo"}, "cannot be built from model.config: .*foo"),
        ("llama", {**SMALL, "intermediate_size": -4}, "cannot be built from model.config"),
        ("llama", {**SMALL, "vocab_size": 5}, "the tokenizer has 257 tokens; leave it out"),
        ("llama", {**SMALL, "max_position_embeddings": 5}, "less than data.context_length"),
    ],
)
def test_a_manifest_that_makes_no_model_is_one_sentence(
    with_model: WithModel, tokenizer: ByteTokenizer, kind: str, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        build(with_model(kind, **config), tokenizer)
    assert "\n" not in str(caught.value)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == choose_device("cpu,cuda:7") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for absent in ("cuda", "cuda:1", "mps"):
        with pytest.raises(SettingsError, match=f'"{absent}" is not on this machine'):
            choose_device(absent)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(SettingsError, match="2 CUDA devices"):
        choose_device("cuda:2")
    with pytest.raises(SettingsError, match="none of auto"):
        choose_device("toaster")


def test_full_memory_is_told_from_other_errors() -> None:
    full = [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ]
    assert all(map(is_out_of_memory, full))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
