"""Small runs that the tests of training share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_work import CPU, RATE, SETTINGS, MakeWork, params

from p2pllm.manifest import DataSection, ModelSection, RunDraft
from p2pllm.sections import OptimizerSection
from p2pllm.training.data import Corpus
from p2pllm.training.local import LocalSteps
from p2pllm.training.model import build
from p2pllm.training.tokenizer import ByteTokenizer

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny products are slower with more, and the tests share their machine."""
    torch.set_num_threads(1)


@pytest.fixture
def draft() -> RunDraft:
    return RunDraft(
        model=ModelSection(type="llama", config=LLAMA),
        data=DataSection(context_length=16, validation_samples=6),
    )


@pytest.fixture
def with_model(draft: RunDraft) -> Callable[..., RunDraft]:
    """The draft with another model: with_model(type, **config)."""

    def change(kind: str, **config: Any) -> RunDraft:
        return draft.model_copy(update={"model": ModelSection(type=kind, config=config)})

    return change


@pytest.fixture
def corpus(draft: RunDraft) -> Corpus:
    random = np.random.default_rng(0)
    return Corpus(random.integers(0, 257, 900), random.integers(0, 257, 100), draft.data)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """30 small files in 3 folders."""
    root = tmp_path / "text"
    for index in range(30):
        file = root / f"part{index % 3}" / f"{index}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"This is text number {index}.\n" * 10)
    return root


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """A word-piece free BPE over bytes with two merges and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"th": 256, "the": 257}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("</s>", special=True)])
    return json.dumps(json.loads(inner.to_str())).encode()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def make_work(draft: RunDraft, tokenizer: ByteTokenizer, corpus: Corpus) -> MakeWork:
    """make_work(settings, micro_batch, wrap): local steps on a model of their own, always the same; a round began."""

    def make(
        settings: OptimizerSection = SETTINGS, micro_batch: int = 4, wrap: Callable[..., Any] = lambda model: model
    ) -> LocalSteps:
        model = wrap(build(draft, tokenizer))
        work = LocalSteps(model, corpus, CPU, run_id="run", peer="peer", settings=settings, micro_batch=micro_batch)
        work.begin(params(work), RATE)
        return work

    return make
