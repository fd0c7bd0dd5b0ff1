"""Text from models, and exports that transformers loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from p2pllm.errors import UsageError
from p2pllm.manifest import ModelSection, RunDraft
from p2pllm.training.export import export
from p2pllm.training.generate import generate
from p2pllm.training.hub import AutoModelForCausalLM, transformers
from p2pllm.training.model import build
from p2pllm.training.tokenizer import ByteTokenizer


class Parrot(torch.nn.Module):
    """Says a fixed text, then the end mark; `lengths` are the tokens it was given at once."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=8)
        self.ids = iter(ids)
        self.lengths: list[int] = []

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.lengths.append(input_ids.shape[1])
        logits = torch.zeros(1, input_ids.shape[1], 257)
        logits[0, -1, next(self.ids)] = 100
        return SimpleNamespace(logits=logits, past_key_values="cache")


def test_text_comes_in_whole_characters_until_the_end_mark() -> None:
    said = "aé日🙂\n"
    parrot = Parrot([*said.encode(), 256, 65])
    assert list(generate(parrot, ByteTokenizer(), "say", 99)) == list(said)


def test_bytes_that_are_no_text_do_not_hold_it_up() -> None:
    pieces = list(generate(Parrot([0xFF] * 20 + [65, 256]), ByteTokenizer(), "x", 99))
    assert len(pieces) > 1 and "".join(pieces).endswith("A")
    assert list(generate(Parrot([0xC3, 256]), ByteTokenizer(), "x", 99)) == ["\ufffd"]


def test_a_full_context_begins_again_with_its_newest_half() -> None:
    parrot = Parrot([65] * 12)
    assert "".join(generate(parrot, ByteTokenizer(), "12345", 12)) == "A" * 12
    assert parrot.lengths == [5, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1]


@pytest.mark.parametrize("prompt", ["", "hello", "a prompt that is longer than the whole context"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_real_models_generate_beyond_their_context(
    draft: RunDraft, tokenizer: ByteTokenizer, prompt: str, kind: str
) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 1}
    section = ModelSection(type=kind, config=config if kind == "mamba" else {**config, "num_attention_heads": 2})
    model = build(draft.model_copy(update={"model": section}), tokenizer)
    texts = ["".join(generate(model, tokenizer, prompt, 40, 1.0, 5, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert model.training


def test_the_cache_changes_nothing(draft: RunDraft, tokenizer: ByteTokenizer) -> None:
    """Within the context, greedy text is that of transformers' own generate without a cache."""
    model: Any = build(draft, tokenizer)
    ids = torch.from_numpy(tokenizer.encode("hello").astype("int64")).unsqueeze(0)
    mask = torch.ones_like(ids)
    theirs = model.eval().generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=False)
    expected = tokenizer.decode(theirs[0, 5:].tolist())
    assert "".join(generate(model, tokenizer, "hello", 10, 0)) == expected


def test_transformers_loads_an_export(draft: RunDraft, tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    model: Any = build(draft, tokenizer).eval()
    export(tmp_path / "new" / "model", model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "model")
    ids = encode("hello ü", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.encode("hello ü").tolist()
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
    assert theirs.generation_config.eos_token_id == theirs.generation_config.pad_token_id == 256
    names = {file.name for file in (tmp_path / "new" / "model").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}


def test_a_folder_that_is_not_empty_is_refused(draft: RunDraft, tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = build(draft, tokenizer)
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="not an empty folder"):
            export(place, model, tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
