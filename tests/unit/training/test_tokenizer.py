"""Tokenizers: round trips, and the same ids from transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pllm.errors import ManifestError
from p2pllm.training.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer, load_tokenizer, tokenizer_digest

HARD = "héllo  world\r\n\t<|endoftext|> </s> don't \x00 日本語 🙂 the\u2028"


@given(st.text())
def test_any_text_survives_bytes(text: str) -> None:
    check_round_trip(load_tokenizer(None), text)


@given(text=st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_a_byte_level_bpe(tokenizer_json: bytes, text: str) -> None:
    check_round_trip(load_tokenizer(tokenizer_json), text)


@given(st.binary())
def test_any_bytes_are_their_own_ids(raw: bytes) -> None:
    assert load_tokenizer(None).encode(raw).tolist() == list(raw)


def test_the_byte_tokenizer() -> None:
    tokenizer = load_tokenizer(None)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode([104, 105, 256, 255]) == "hi\ufffd"
    assert tokenizer.digest == tokenizer_digest(None) != tokenizer_digest(b"{}")


def test_a_tokenizer_json(tokenizer_json: bytes) -> None:
    tokenizer = load_tokenizer(tokenizer_json)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (260, 259)
    assert tokenizer.encode("the").tolist() == [257]
    assert tokenizer.encode(b"\xff").size > 0, "bytes that are no UTF-8 become replacement characters"
    assert 259 not in tokenizer.encode("</s>"), "a text cannot end itself"
    assert tokenizer.encode("x").dtype == np.uint16
    assert tokenizer.digest == tokenizer_digest(tokenizer_json)


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_transformers_loads_what_is_saved(kind: str, tokenizer_json: bytes, tmp_path: Path) -> None:
    from p2pllm.training.hub import transformers

    tokenizer = load_tokenizer(None if kind == "bytes" else tokenizer_json)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(HARD).tolist()
    assert theirs(HARD)["input_ids"] == ids
    assert theirs.decode(ids) == HARD
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "not valid"),
        (b"{}", "not valid"),
        (b"\xff\xfe", "not valid"),
        (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "ends a text"),
        (b" " * (MAX_TOKENIZER_BYTES + 1), "16 MiB"),
    ],
)
def test_a_bad_tokenizer_json_is_one_sentence(source: bytes, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        load_tokenizer(source)
    assert "\n" not in str(caught.value)


def test_data_and_tokenizer_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, p2pllm.training.data, p2pllm.training.tokenizer, p2pllm.state\n"
        "assert not {'torch', 'transformers', 'hivemind'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not ids.size or ids.max() < tokenizer.vocab_size
    assert np.array_equal(ids, tokenizer.encode(text.encode()))
