"""Exports: a folder that transformers loads with from_pretrained, without p2pllm.

What does not live here: snapshots of a run (`state.snapshot`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from p2pllm.errors import StateError, UsageError
from p2pllm.training.tokenizer import Tokenizer


def export(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write weights (safetensors), configuration, generation configuration and tokenizer into a new folder.

    Raises UsageError if there is something in it already, StateError if it cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not an empty folder; name a new one for the export.")
        folder.mkdir(parents=True, exist_ok=True)
        exported: Any = model
        exported.generation_config.pad_token_id = tokenizer.end_of_text
        exported.save_pretrained(folder)
        tokenizer.save(folder)
    except OSError as error:
        raise StateError(f"The export cannot be written to {folder}: {error.strerror or error}.") from None
