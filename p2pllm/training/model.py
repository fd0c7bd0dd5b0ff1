"""Models: from a manifest to a torch module, and between a module and flat vectors.

What does not live here: gradients (`inner`), files (`export`), the shared state's own rules (`state`).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from p2pllm.errors import ManifestError, StateError
from p2pllm.manifest import RunDraft
from p2pllm.state import FLOAT, Layout, SharedState, moments_of
from p2pllm.training.hub import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForCausalLM,
)
from p2pllm.training.tokenizer import Tokenizer

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_OURS = frozenset(
    {
        "model_type",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "architectures",
        "_name_or_path",
        "auto_map",
    }
)
"""Keys that configurations have but a manifest may not set: they name no property of the architecture."""

_LEGACY_ROPE = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
"""Keys that transformers 5 folds into rope_parameters."""


def build(draft: RunDraft, tokenizer: Tokenizer) -> nn.Module:
    """The manifest's model with its initial weights: float32, on the CPU, in training mode.

    The same draft gives the same weights under the same versions of torch and transformers; the global
    random state is left as it was. Vocabulary, context length and the ids of marks are filled in where the
    manifest does not give them. Raises ManifestError for a type that does not exist or is no causal language
    model, for an unknown key of `model.config`, and for values that the architecture refuses.
    """
    config = _config(draft, tokenizer)
    kind = draft.model.type
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would also reseed accelerators, which fork_rng does not put back here
        torch.default_generator.manual_seed(draft.seed)
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(config).float()
            _check_causal(model, kind, tokenizer.vocab_size)
        except ManifestError:
            raise
        except Exception as error:  # noqa: BLE001 - architectures raise anything for values that do not fit
            raise ManifestError(
                f"The model {kind} cannot be built from model.config: {_phrase(error)}; change these values."
            ) from None
    return model.train()


def initial_state(draft: RunDraft, tokenizer: Tokenizer) -> SharedState:
    """The shared state at round 0: the manifest's initial weights, zero moments. Raises as `build`."""
    model = build(draft, tokenizer)
    layout = layout_of(model).with_moments(moments_of(draft))
    params = np.empty(layout.size, FLOAT)
    read_params(model, params)
    return SharedState.initial(layout, params)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that is trained, in the order of the layout; tied weights come once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def layout_of(model: nn.Module) -> Layout:
    """Where each trained parameter lies in a flat vector."""
    return Layout.of((name, tuple(parameter.shape)) for name, parameter in trained_parameters(model))


def read_params(model: nn.Module, flat: np.ndarray) -> None:
    """Copy the parameters into `flat`, float32 of shape (layout.size,); StateError if it does not fit."""
    for view, parameter in _pairs(model, flat):
        np.copyto(view, parameter.detach().float().cpu().numpy())


def write_params(model: nn.Module, flat: np.ndarray) -> None:
    """Copy `flat`, float32 of shape (layout.size,), into the parameters; StateError if it does not fit."""
    with torch.no_grad():
        for view, parameter in _pairs(model, flat):
            # torch warns about views that it must not write to, although it only reads this one
            parameter.copy_(torch.from_numpy(view if view.flags.writeable else view.copy()))


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model can look at, at most; None if its architecture has no bound."""
    config: Any = model.config
    return next((int(getattr(config, name)) for name in _POSITIONS if getattr(config, name, None)), None)


def _pairs(model: nn.Module, flat: np.ndarray) -> Iterator[tuple[np.ndarray, nn.Parameter]]:
    if flat.dtype != FLOAT:
        raise StateError(f"A flat vector has elements of type {flat.dtype} instead of float32.")
    return zip(layout_of(model).views(flat).values(), (p for _, p in trained_parameters(model)), strict=True)


def _config(draft: RunDraft, tokenizer: Tokenizer) -> Any:
    """transformers' configuration of the draft's model, complete and checked."""
    config_class = _config_class(draft.model.type)
    known = _known_keys(config_class)
    given = dict(draft.model.config)
    for key in given:
        if key not in known:
            raise ManifestError(
                f"model.config.{key} is not a setting of the model {draft.model.type}{_suggest(key, known)}."
            )
    positions = next((name for name in _POSITIONS if name in known), None)
    mark = tokenizer.end_of_text
    # no padding id: an embedding does not learn at that id, and nothing is ever padded in training
    filled: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": mark,
        "eos_token_id": mark,
        "pad_token_id": None,
    }
    aliases = getattr(config_class, "attribute_map", {})
    if positions is not None and not {positions, aliases.get(positions), *_POSITIONS} & set(given):
        filled[positions] = draft.data.context_length
    filled = {key: value for key, value in filled.items() if key in known}
    try:
        config = config_class(**{**filled, **given})
    except Exception as error:  # noqa: BLE001 - configurations raise anything
        raise ManifestError(f"model.config does not fit the model {draft.model.type}: {_phrase(error)}.") from None
    _check_config(config, draft, tokenizer, positions)
    return config


def _config_class(kind: str) -> Any:
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in CONFIG_MAPPING_NAMES:
        return CONFIG_MAPPING[kind]
    if kind in CONFIG_MAPPING_NAMES:
        raise ManifestError(
            f'The model.type "{kind}" is not a causal language model; take one such as llama, qwen3 or gpt2.'
        )
    usable = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    raise ManifestError(
        f'There is no model.type "{kind}" in this version of transformers{_suggest(kind, usable)}; '
        "take the model_type from any model's config.json, for example llama, qwen3 or gpt2."
    )


def _known_keys(config_class: Any) -> set[str]:
    """What a configuration takes. transformers accepts any other key too, silently, so a slip would train
    another model than was meant."""
    keys = set(inspect.signature(config_class).parameters)
    # before transformers 5 a signature ended in **kwargs, and what all models share was not in it
    if "kwargs" in keys:
        keys |= set(config_class().to_dict())
    aliases = getattr(config_class, "attribute_map", {})
    keys |= set(aliases) | set(aliases.values())
    if "rope_parameters" in keys:
        keys |= _LEGACY_ROPE
    return {key for key in keys if not key.startswith("_")} - _OURS - {"self", "kwargs"}


def _check_config(config: Any, draft: RunDraft, tokenizer: Tokenizer, positions: str | None) -> None:
    kind = draft.model.type
    if config.get_text_config() is not config:
        raise ManifestError(f'The model.type "{kind}" is made of several models; take that of its text model.')
    vocabulary = getattr(config, "vocab_size", tokenizer.vocab_size)
    if vocabulary < tokenizer.vocab_size:
        raise ManifestError(
            f"model.config.vocab_size is {vocabulary}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            "leave it out."
        )
    if positions is not None and getattr(config, positions) < draft.data.context_length:
        raise ManifestError(
            f"model.config.{positions} is {getattr(config, positions)}, less than data.context_length, which "
            f"is {draft.data.context_length}; leave it out."
        )


def _check_causal(model: nn.Module, kind: str, vocab_size: int) -> None:
    """An encoder such as bert builds too; it would look at the tokens that it shall predict."""
    first = torch.arange(8).remainder(vocab_size).unsqueeze(0)
    second = first.clone()
    second[0, -1] = vocab_size - 1
    with torch.no_grad():
        model.eval()
        a, b = (model(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (first, second))
    if a.shape[-1] < vocab_size:
        raise ManifestError(f"The model {kind} predicts {a.shape[-1]} tokens, fewer than the tokenizer has.")
    if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
        raise ManifestError(
            f"The model {kind} with this model.config looks at the tokens that it shall predict; "
            "set is_decoder = true or take a causal model such as llama."
        )


def _suggest(word: str, known: set[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _phrase(error: Exception) -> str:
    """The telling line of an exception: the last one, where transformers quotes the cause."""
    line = (str(error).strip().splitlines() or [""])[-1].strip().rstrip(".")
    for prefix in ("TypeError: ", "ValueError: "):
        line = line.removeprefix(prefix)
    return f"{type(error).__name__} {line}" if isinstance(error, (KeyError, IndexError)) or not line else line
