"""Inner optimizers: which parameter goes where, and moments that survive a stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from p2pllm.errors import StateError
from p2pllm.manifest import RunDraft
from p2pllm.sections import OptimizerSection
from p2pllm.training.model import build, layout_of, read_params, trained_parameters
from p2pllm.training.optimizers import InnerOptimizer, build_optimizers, hidden_matrices
from p2pllm.training.tokenizer import ByteTokenizer

WithModel = Callable[..., RunDraft]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SETTINGS = OptimizerSection(beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.5, clip_norm=0.5)
MUON = SETTINGS.model_copy(update={"type": "muon"})


def names_of(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> list[str]:
    by_parameter = {parameter: name for name, parameter in model.named_parameters()}
    return sorted(by_parameter[parameter] for parameter in parameters)


def made_up(model: torch.nn.Module, seed: int) -> list[torch.Tensor]:
    """Gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for _, parameter in trained_parameters(model)]


def flat(model: torch.nn.Module) -> np.ndarray:
    out = np.empty(layout_of(model).size, np.float32)
    read_params(model, out)
    return out


@pytest.mark.parametrize("settings", [SETTINGS, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_has_one_optimizer_and_only_matrices_decay(
    draft: RunDraft, with_model: WithModel, tokenizer: ByteTokenizer, tied: bool, settings: OptimizerSection
) -> None:
    model = build(with_model("llama", **{**draft.model.config, "tie_word_embeddings": tied}), tokenizer)
    groups = [group for one in build_optimizers(model, settings) for group in one.param_groups]
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    for group in groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} <= {group["weight_decay"] == 0.5}


def test_muon_takes_hidden_matrices_whether_weights_are_tied_or_not(
    draft: RunDraft, with_model: WithModel, tokenizer: ByteTokenizer
) -> None:
    for tied in (True, False):
        model: Any = build(with_model("llama", **{**draft.model.config, "tie_word_embeddings": tied}), tokenizer)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        expected = [name for name, _ in model.named_parameters() if "_proj" in name]
        assert names_of(model, hidden_matrices(model)) == sorted(expected) and len(expected) == 14


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("gpt2", SMALL, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("mamba", {**SMALL, "state_size": 4}, ["dt_proj", "in_proj", "out_proj", "x_proj"]),
        (
            "bert",
            {**SMALL, "intermediate_size": 48, "is_decoder": True},
            ["attention.output.dense", "self.key", "self.query", "self.value", "intermediate.dense", "output.dense",
             "predictions.transform.dense"],
        ),
        (
            "gpt_neox",
            {**SMALL, "intermediate_size": 48},
            ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        ),
    ],
)  # fmt: skip
def test_the_rule_holds_for_other_architectures(
    with_model: WithModel, tokenizer: ByteTokenizer, kind: str, config: dict[str, Any], expected: list[str]
) -> None:
    config = {key: value for key, value in config.items() if kind != "mamba" or key != "num_attention_heads"}
    model = build(with_model(kind, **config), tokenizer)
    found = names_of(model, hidden_matrices(model))
    assert len(found) == len(expected)
    for ending in expected:
        assert any(name.endswith(f".{ending}.weight") for name in found), (ending, found)


def test_a_model_without_hidden_matrices_has_adamw_alone() -> None:
    (only,) = build_optimizers(torch.nn.LayerNorm(4), MUON)
    assert isinstance(only, torch.optim.AdamW)


@pytest.mark.parametrize("settings", [SETTINGS, MUON], ids=["adamw", "muon"])
def test_making_an_optimizer_moves_nothing(
    draft: RunDraft, tokenizer: ByteTokenizer, settings: OptimizerSection
) -> None:
    """Though it takes a step for its memory: the next one is a first one, with its bias correction."""
    model, other = build(draft, tokenizer), build(draft, tokenizer)
    before = flat(model)
    optimizer = InnerOptimizer(model, settings)
    assert np.array_equal(flat(model), before)
    optimizer.step(made_up(model, 1), 0.01)
    for parameter, gradient in zip(other.parameters(), made_up(other, 1), strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    for plain in build_optimizers(other, settings):
        for group in plain.param_groups:
            group["lr"] = 0.01
        plain.step()
    assert np.array_equal(flat(model), flat(other)) and not np.array_equal(flat(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("settings", [SETTINGS, MUON], ids=["adamw", "muon"])
def test_a_stop_changes_nothing(
    draft: RunDraft, tokenizer: ByteTokenizer, tmp_path: Path, settings: OptimizerSection
) -> None:
    through, stopped = build(draft, tokenizer), build(draft, tokenizer)
    first, second = InnerOptimizer(through, settings), InnerOptimizer(stopped, settings)
    for optimizer, model in ((first, through), (second, stopped)):
        optimizer.step(made_up(model, 1), 0.01)
        optimizer.step(made_up(model, 2), 0.01)
    second.save(tmp_path / "new" / "moments", "run")
    second = InnerOptimizer(stopped, settings)
    assert second.load(tmp_path / "new" / "moments", "run")
    for optimizer, model in ((first, through), (second, stopped)):
        optimizer.step(made_up(model, 3), 0.01)
    assert np.array_equal(flat(through), flat(stopped))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["moments"]


def test_other_tools_can_read_the_file(draft: RunDraft, tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    model = build(draft, tokenizer)
    optimizer = InnerOptimizer(model, MUON)
    gradients = made_up(model, 1)
    optimizer.step([gradient.clone() for gradient in gradients], 0.01)
    optimizer.save(tmp_path / "moments", "run")
    tensors = safetensors.numpy.load_file(tmp_path / "moments")
    assert tensors["model.norm.weight.step"] == 1.0
    assert tensors["model.embed_tokens.weight.exp_avg"].shape == (257, 32)
    assert tensors["model.layers.0.mlp.up_proj.weight.momentum_buffer"].any()


def test_without_a_file_moments_stay(draft: RunDraft, tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    optimizer = InnerOptimizer(build(draft, tokenizer), SETTINGS)
    assert not optimizer.load(tmp_path / "nowhere" / "moments", "run")


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"", "ends too early"),
        (lambda raw: raw[:-1], "digest"),
        (lambda raw: raw[: len(raw) // 2], "ends too early"),
        (lambda raw: raw + b"x", "digest"),
        (lambda raw: flipped(raw, 20), "not of this run"),
        (lambda raw: flipped(raw, len(raw) // 2), "digest"),
        (lambda raw: flipped(raw, len(raw) - 1), "digest"),
        (lambda raw: b"\xff" * len(raw), "not of this run"),
    ],
)
def test_a_damaged_file_means_fresh_moments_and_a_warning(
    draft: RunDraft,
    tokenizer: ByteTokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
    words: str,
) -> None:
    model = build(draft, tokenizer)
    before = flat(model)
    fresh = InnerOptimizer(model, SETTINGS)
    fresh.step(made_up(model, 1), 0.01)
    expected = flat(model) - before
    fresh.save(tmp_path / "moments", "run")
    (tmp_path / "moments").write_bytes(damage((tmp_path / "moments").read_bytes()))
    refused(fresh, tmp_path / "moments", "run", words, caplog)

    other = build(draft, tokenizer)
    again = InnerOptimizer(other, SETTINGS)
    assert not again.load(tmp_path / "moments", "run")
    again.step(made_up(other, 1), 0.01)
    assert np.array_equal(flat(other) - before, expected), "nothing of the file is left in the moments"


def test_a_foreign_file_means_fresh_moments(
    draft: RunDraft, with_model: WithModel, tokenizer: ByteTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(draft, tokenizer)
    optimizer = InnerOptimizer(model, SETTINGS)
    optimizer.save(tmp_path / "moments", "run")
    larger = build(with_model("llama", **{**draft.model.config, "intermediate_size": 64}), tokenizer)
    refused(optimizer, tmp_path / "moments", "other run", "not of this run", caplog)
    refused(InnerOptimizer(model, MUON), tmp_path / "moments", "run", "not of this run", caplog)
    refused(InnerOptimizer(larger, SETTINGS), tmp_path / "moments", "run", "not of this run", caplog)
    assert optimizer.load(tmp_path / "moments", "run")


def test_moments_that_are_not_finite_are_never_taken_again(
    draft: RunDraft, tokenizer: ByteTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a peer that stops while it diverges would diverge after every start."""
    model = build(draft, tokenizer)
    optimizer = InnerOptimizer(model, SETTINGS.model_copy(update={"clip_norm": 0.0}))
    optimizer.step([gradient.mul_(float("inf")) for gradient in made_up(model, 1)], 0.01)
    optimizer.save(tmp_path / "moments", "run")
    refused(optimizer, tmp_path / "moments", "run", "not finite", caplog)


def test_a_disk_that_takes_nothing_is_one_sentence(draft: RunDraft, tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"The moments of the inner optimizer cannot be saved in .*file") as caught:
        InnerOptimizer(build(draft, tokenizer), SETTINGS).save(tmp_path / "file" / "moments", "run")
    assert "\n" not in str(caught.value)


def refused(optimizer: InnerOptimizer, file: Path, run_id: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """The file is not used, one warning says why, and all moments are fresh."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not optimizer.load(file, run_id)
    (record,) = caplog.records
    assert words in record.getMessage() and "fresh moments" in record.getMessage()
    assert not any(tensor.any() for _, tensor in optimizer._tensors())
