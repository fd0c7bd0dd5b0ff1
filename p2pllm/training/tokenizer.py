"""Tokenizers: text to token ids and back, of bytes or from a tokenizer.json.

Imports neither torch nor transformers. What does not live here: cutting a corpus into windows (`data`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from blake3 import blake3
from tokenizers import decoders, models, pre_tokenizers

from p2pllm.errors import ManifestError

MAX_TOKENIZER_BYTES = 16 * 1024 * 1024
"""Bound on a tokenizer.json that travels with a run."""

END_OF_TEXT = "<|endoftext|>"
"""The end mark of the byte tokenizer, and the first one that is looked for in a tokenizer.json."""

_END_MARKS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of `training` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 <= id < vocab_size."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id that stands between documents."""
        ...

    @property
    def digest(self) -> str:
        """`tokenizer_digest` of the source, 64 hex digits."""
        ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text (bytes: UTF-8), shape (tokens,), uint16 or uint32; no mark is added or recognised."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without end marks; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Write what transformers' AutoTokenizer.from_pretrained(folder) needs to encode identically."""
        ...


def load_tokenizer(source: bytes | None) -> Tokenizer:
    """The byte tokenizer (None) or the one of a tokenizer.json.

    Raises ManifestError if the file is too large, malformed, or has no mark for the end of a text.
    """
    return ByteTokenizer() if source is None else JsonTokenizer(source)


def tokenizer_digest(source: bytes | None) -> str:
    """BLAKE3 of a tokenizer.json, or of the word "bytes" for the byte tokenizer; 64 hex digits."""
    return str(blake3(b"bytes" if source is None else source).hexdigest())


class ByteTokenizer:
    """Each byte is a token; id 256 ends a text."""

    vocab_size = 257
    end_of_text = 256
    digest = tokenizer_digest(None)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Bytes of the text, shape (bytes,), uint16."""
        # lone surrogates come from undecodable file names and the like; nothing better can be done with them
        raw = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
        return np.frombuffer(raw, np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ids from 256 on are left out."""
        return bytes(id_ for id_ in map(int, ids) if id_ < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write the same mapping as a byte-level BPE without merges."""
        alphabet = _byte_alphabet()
        model = models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[])
        inner = tokenizers.Tokenizer(model)
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
        _save(folder, inner.to_str(), END_OF_TEXT)


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, source: bytes) -> None:
        """source: content of a tokenizer.json. Raises ManifestError as `load_tokenizer`."""
        self._inner: Any = _parse(source)
        self._source = source
        self.digest = tokenizer_digest(source)
        vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps, so not their number
        self.end_mark = next((mark for mark in _END_MARKS if mark in vocabulary), "")
        if not self.end_mark:
            raise ManifestError(
                f"The tokenizer.json has no token that ends a text; add {END_OF_TEXT} to its added_tokens."
            )
        self.end_of_text = vocabulary[self.end_mark]
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of the text, shape (tokens,), uint16 or uint32 by the size of the vocabulary."""
        if isinstance(text, str):
            text = text.encode("utf-8", errors="replace")
        encoding = self._inner.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.array(encoding.ids, self._dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special tokens."""
        return str(self._inner.decode([int(id_) for id_ in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the tokenizer.json as it came, and its configuration."""
        _save(folder, self._source.decode("utf-8"), self.end_mark)


def _parse(source: bytes) -> Any:
    if len(source) > MAX_TOKENIZER_BYTES:
        raise ManifestError(
            f"The tokenizer.json has {len(source) / 2**20:.0f} MiB, more than the "
            f"{MAX_TOKENIZER_BYTES >> 20} MiB allowed; use a smaller vocabulary."
        )
    try:
        inner = tokenizers.Tokenizer.from_str(source.decode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for everything
        raise ManifestError(f"The tokenizer.json is not valid: {_first_line(error)}.") from None
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # a text that spells an end mark must not end there
    return inner


def _save(folder: Path, tokenizer_json: str, end_mark: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_mark,
        "eos_token": end_mark,
        "pad_token": end_mark,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as encode_special_tokens above
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's bytes_to_unicode)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
