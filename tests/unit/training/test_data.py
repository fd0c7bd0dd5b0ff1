"""Text and tokens: what is found, how it is split, drawn and cached."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from p2pllm.errors import DataError, StateError
from p2pllm.sections import DataSection
from p2pllm.training import data
from p2pllm.training.data import Corpus, documents, text_digest
from p2pllm.training.sources import read_pieces
from p2pllm.training.tokenizer import ByteTokenizer, load_tokenizer

TOKENIZER = ByteTokenizer()


def section(source: str | Path, **fields: object) -> DataSection:
    return DataSection(**{"context_length": 16, "source": f"text:{source}", **fields})  # type: ignore[arg-type]


def test_the_standard_library_is_found() -> None:
    names = [document.name for document in documents("stdlib")]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert names == sorted(names)
    assert not any(part in name.split("/") for name in names for part in ("site-packages", "test", "idlelib"))


def test_a_folder_a_glob_and_a_file(text_folder: Path) -> None:
    folder = [document.name for document in documents(f"text:{text_folder}")]
    assert len(folder) == 30 and folder[0] == "part0/0.txt"
    assert documents(f"text:{text_folder}/part1/*.txt")[0].name == "1.txt"
    assert len(documents(f"text:{text_folder}/**/*.txt")) == 30
    assert [document.name for document in documents(f"text:{text_folder}/part0/0.txt")] == ["text"]


def test_data_path_replaces_the_place_but_not_the_digest(text_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(text_folder, tmp_path / "copy")
    here = documents("text:/the/founder/had/it/here", str(tmp_path / "copy"))
    assert text_digest(here) == text_digest(documents(f"text:{text_folder}"))
    (tmp_path / "renamed").write_bytes((text_folder / "part0" / "0.txt").read_bytes())
    assert text_digest(documents(f"text:{tmp_path}/renamed")) == text_digest(
        documents(f"text:{text_folder}/part0/0.txt")
    )


def test_every_name_and_byte_is_in_the_digest(text_folder: Path) -> None:
    digests = {text_digest(documents(f"text:{text_folder}"))}
    (text_folder / "part0" / "0.txt").write_text("other")
    digests.add(text_digest(documents(f"text:{text_folder}")))
    (text_folder / "part0" / "0.txt").rename(text_folder / "part0" / "00.txt")
    digests.add(text_digest(documents(f"text:{text_folder}")))
    assert len(digests) == 3


def test_what_is_no_text_is_left_out(text_folder: Path) -> None:
    (text_folder / "picture").write_bytes(b"\x89PNG\0\0")
    (text_folder / "empty.txt").write_text("")
    (text_folder / ".hidden").write_text("hidden")
    (text_folder / "dangling").symlink_to("nowhere")
    os.mkfifo(text_folder / "pipe")
    assert len(documents(f"text:{text_folder}")) == 30


@pytest.mark.parametrize("name", ["nothing", "nothing/*.txt", "empty", "binary"])
def test_no_text_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\0")
    with pytest.raises(DataError, match="There is no readable text at"):
        documents(f"text:{tmp_path / name}")


def test_pieces_join_to_the_file_and_end_with_lines(tmp_path: Path) -> None:
    content = b"".join(b"line %d\n" % index for index in range(400_000))
    (tmp_path / "big").write_bytes(content)
    pieces = list(read_pieces(documents(f"text:{tmp_path}/big")[0]))
    assert b"".join(pieces) == content and len(pieces) > 2
    assert all(piece.endswith(b"\n") for piece in pieces)


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_a_corpus_holds_the_text(kind: str, text_folder: Path, tmp_path: Path, tokenizer_json: bytes) -> None:
    tokenizer = load_tokenizer(None if kind == "bytes" else tokenizer_json)
    corpus = Corpus.open(section(text_folder, validation_fraction=0.2), tokenizer, tmp_path / "cache")
    both = np.concatenate([corpus.train, corpus.validation])
    texts = [document.path.read_text() for document in documents(f"text:{text_folder}")]
    ends = np.flatnonzero(both == tokenizer.end_of_text)
    assert len(ends) == 30
    assert sorted(map(tokenizer.decode, np.split(both, ends + 1)[:-1])) == sorted(texts)
    assert corpus.validation[-1] == corpus.train[-1] == tokenizer.end_of_text


def test_a_document_stays_on_its_side_when_others_come(text_folder: Path) -> None:
    chosen = section(text_folder, validation_fraction=0.3)
    before = data.split(documents(chosen.source), chosen)
    (text_folder / "part0" / "new.txt").write_text("new " * 50)
    after = data.split(documents(chosen.source), chosen)
    assert {d.name for d in before[1]} == {d.name for d in after[1]} - {"part0/new.txt"}
    assert 3 <= len(before[1]) <= 15


def test_few_documents_still_hold_something_out(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 400)
    corpus = Corpus.open(section(tmp_path), TOKENIZER, tmp_path / "cache")
    assert len(corpus.train) == len(corpus.validation) == 401


def test_of_a_single_file_the_tail_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(bytes(range(1, 201)) * 5)
    corpus = Corpus.open(section(tmp_path / "one.txt", validation_fraction=0.1), TOKENIZER, tmp_path / "cache")
    assert (len(corpus.train), len(corpus.validation)) == (901, 100)
    assert corpus.validation[-2:].tolist() == [200, 256]


@pytest.mark.parametrize("size", [1, 16, 30])
def test_too_little_text_is_one_sentence(tmp_path: Path, size: int) -> None:
    (tmp_path / "one.txt").write_text("x" * size)
    with pytest.raises(DataError, match="use more text or a smaller context_length"):
        Corpus.open(section(tmp_path / "one.txt"), TOKENIZER, tmp_path / "cache")


def test_another_text_than_the_runs_is_refused_also_from_the_cache(text_folder: Path, tmp_path: Path) -> None:
    digest = text_digest(documents(f"text:{text_folder}"))
    Corpus.open(section(text_folder, digest=digest), TOKENIZER, tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(DataError, match="is not the text of this run"):
            Corpus.open(section(text_folder, digest="0" * 64), TOKENIZER, tmp_path / "cache")


def test_the_cache_is_used_until_the_text_changes(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    first = Corpus.open(section(text_folder), TOKENIZER, tmp_path / "cache", progress=lambda *at: seen.append(at))
    total = sum(document.size for document in documents(f"text:{text_folder}"))
    assert seen[-1] == (total, total) and len(seen) == 30
    again = Corpus.open(section(text_folder), TOKENIZER, tmp_path / "cache", progress=lambda *at: seen.append(at))
    assert len(seen) == 30
    assert np.array_equal(first.train, again.train)
    (text_folder / "part0" / "0.txt").write_text("changed")
    Corpus.open(section(text_folder), TOKENIZER, tmp_path / "cache", progress=lambda *at: seen.append(at))
    assert len(seen) == 60


def test_a_cut_off_cache_is_built_again(text_folder: Path, tmp_path: Path) -> None:
    first = Corpus.open(section(text_folder), TOKENIZER, tmp_path / "cache").train.copy()
    (file,) = (tmp_path / "cache").glob("*.tokens")
    os.truncate(file, 100)
    assert np.array_equal(Corpus.open(section(text_folder), TOKENIZER, tmp_path / "cache").train, first)


def test_several_processes_may_build_at_once(text_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_and_check, args=(text_folder, tmp_path / "cache")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 2
    assert len(list((tmp_path / "cache").glob("*.tokens"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def build_and_check(text: Path, cache: Path) -> None:
    assert len(Corpus.open(section(text), TOKENIZER, cache).train) > 1000


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "full; free"), (errno.EACCES, "not permitted")])
def test_a_disk_that_takes_no_cache_is_one_sentence(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def fail(_handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(data.os, "fsync", fail)
    with pytest.raises(StateError, match=words):
        Corpus.open(section(text_folder), TOKENIZER, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.t*")), "nothing half-built is left"


def test_text_that_vanishes_is_one_sentence(text_folder: Path) -> None:
    found = documents(f"text:{text_folder}")
    found[3].path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        text_digest(found)


def test_draws_depend_on_their_arguments_alone(corpus: Corpus) -> None:
    first = corpus.draw("run", "peer", 3, 1, 5)
    assert first.shape == (5, 17) and first.dtype == np.int64
    assert np.array_equal(first, corpus.draw("run", "peer", 3, 1, 5))
    assert np.array_equal(first[:2], corpus.draw("run", "peer", 3, 1, 2))
    others = [("run2", "peer", 3, 1), ("run", "peer2", 3, 1), ("run", "peer", 4, 1), ("run", "peer", 3, 2)]
    assert all(not np.array_equal(first, corpus.draw(*other, 5)) for other in others)


def test_draws_never_change() -> None:
    """Recorded: peers audit each other's samples by drawing them again."""
    corpus = Corpus(np.arange(60_000), np.arange(100), DataSection(context_length=16))
    assert corpus.draw("run", "peer", 3, 1, 4)[:, 0].tolist() == [33808, 23642, 20175, 15798]


def test_draws_reach_every_start_evenly() -> None:
    corpus = Corpus(np.arange(27), np.arange(17), DataSection(context_length=16))
    counts = np.bincount(corpus.draw("run", "peer", 0, 0, 11_000)[:, 0])
    assert len(counts) == 11, "27 tokens have 11 windows of 17"
    assert counts.min() > 850 and counts.max() < 1150


def test_validation_windows_are_evenly_spread(corpus: Corpus) -> None:
    windows = corpus.validation_windows()
    assert windows.shape == (6, 17) and windows.dtype == np.int64
    assert np.array_equal(windows[0], corpus.validation[:17])
    assert np.array_equal(windows[-1], corpus.validation[-17:])
