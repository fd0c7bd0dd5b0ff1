"""Generation: text from a model, token by token.

What does not live here: loading states or exports (`state.snapshot`, `export`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from p2pllm.training.model import context_length
from p2pllm.training.tokenizer import Tokenizer

_LONGEST_HELD = 8
"""Tokens held back at most while they do not end with a whole character."""


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue `prompt`; yields pieces of text as they come, without the prompt.

    temperature: 0 always takes the likeliest token. top_k: choose among so many likeliest tokens; 0 = all.
    seed: of the draws; None draws anew each time. It ends at the end mark. Beyond the context length the
    model sees the newest half of its context and whatever was added since.
    """
    ids = [int(id_) for id_ in tokenizer.encode(prompt)] or [tokenizer.end_of_text]
    text = _Text(tokenizer, ids)
    for id_ in _sample(model, tokenizer, ids, max_new_tokens, _Chooser(temperature, top_k, seed)):
        if piece := text.add(id_):
            yield piece
    if piece := text.rest():
        yield piece


class _Chooser:
    """Draws on the CPU in float32, so that a seed gives one text on any device, but for rounding."""

    def __init__(self, temperature: float, top_k: int, seed: int | None) -> None:
        self._temperature, self._top_k = temperature, top_k
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def choose(self, logits: torch.Tensor) -> int:
        """An id from logits of shape (vocabulary,)."""
        logits = logits.float().cpu()
        if self._temperature <= 0:
            return int(logits.argmax())
        if 0 < self._top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self._top_k).values[-1], float("-inf"))
        chances = torch.softmax(logits / self._temperature, dim=0)
        return int(torch.multinomial(chances, 1, generator=self._generator))


def _sample(
    model: nn.Module, tokenizer: Tokenizer, ids: list[int], max_new_tokens: int, chooser: _Chooser
) -> Iterator[int]:
    """New ids one by one. Keys and values of seen tokens are cached by the model where it can."""
    ids = list(ids)
    limit = context_length(model)
    device = next(model.parameters()).device
    was_training = model.training
    cache: Any = None
    seen = 0  # tokens in the cache
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache is None or (limit is not None and seen >= limit):
                # a full cache cannot slide, its keys have fixed positions; begin again with half of it
                cache = None
                new = ids if limit is None or len(ids) < limit else ids[-max(1, limit // 2) :]
                seen = 0
            else:
                new = ids[-1:]
            with torch.no_grad():
                output = model(input_ids=torch.tensor([new], device=device), past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            seen += len(new)
            id_ = chooser.choose(output.logits[0, -1, : tokenizer.vocab_size])
            if id_ == tokenizer.end_of_text:
                return
            ids.append(id_)
            yield id_
    finally:
        model.train(was_training)


class _Text:
    """Turns ids into text piece by piece.

    A character may need several tokens, and a token's text may depend on the one before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._before = prompt[-_LONGEST_HELD:]
        self._held: list[int] = []

    def add(self, id_: int) -> str:
        """The text that has become final with this token."""
        self._held.append(id_)
        piece = self._piece()
        if piece.endswith("\ufffd") and len(self._held) < _LONGEST_HELD:
            return ""
        self._before, self._held = self._held, []
        return piece

    def rest(self) -> str:
        """What was held back."""
        return self._piece() if self._held else ""

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._held)[len(before) :]
