"""Corpus: the text of a run as memory-mapped tokens, and the windows that training and evaluation read.

Imports neither torch nor transformers. What does not live here: finding the text (`sources`) and tokenizing
one text (`tokenizer`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from p2pllm.errors import DataError, NoRoomError
from p2pllm.sections import DataSection
from p2pllm.training.sources import (
    Document,
    Progress,
    check_digest,
    combined_digest,
    documents,
    read_pieces,
    text_digest,
)
from p2pllm.training.tokenizer import Tokenizer

__all__ = ["Corpus", "Document", "Progress", "documents", "text_digest"]

_FORMAT = "p2pllm tokens 1"
_BYTES_A_TOKEN = 8  # a generous guess, to hold out enough text for one window


@dataclass(frozen=True)
class _Index:
    """What lies in a token file: `train` tokens for training, then those held out."""

    dtype: str
    train: int
    total: int
    digest: str


class Corpus:
    """Tokens of a run, split by document into training and validation. Open it with `Corpus.open`."""

    def __init__(self, train: np.ndarray, validation: np.ndarray, section: DataSection) -> None:
        """train, validation: token ids, shape (tokens,), any unsigned type.

        Raises DataError if one of them is shorter than a window of context_length + 1 tokens.
        """
        self.train, self.validation = train, validation
        self.window_length = section.context_length + 1
        self._validation_samples = section.validation_samples
        for name, tokens in (("training", train), ("validation", validation)):
            if len(tokens) < self.window_length:
                raise DataError(
                    f"The {name} text has {len(tokens)} tokens, but one sample needs {self.window_length}; "
                    "use more text or a smaller context_length."
                )

    @classmethod
    def open(
        cls,
        section: DataSection,
        tokenizer: Tokenizer,
        cache_dir: Path,
        data_path: str = "",
        progress: Progress | None = None,
    ) -> Corpus:
        """The corpus of a manifest's data section; tokenized once and then read from `cache_dir`.

        Several processes may do this at once: one builds, the others wait for it. Raises DataError if the
        text is missing, unreadable, too short or not the run's; NoRoomError if the cache cannot be written.
        """
        found = documents(section.source, data_path)
        key = _cache_key(found, section, tokenizer)
        tokens_file = cache_dir / f"{key}.tokens"
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(cache_dir / f"{key}.lock", lambda: progress and progress(0, 0)):
                index = _load_index(tokens_file) or _build(tokens_file, found, section, tokenizer, progress)
                with tokens_file.open("rb") as file:
                    # The memory map keeps this lock, so that whoever frees disk sees that the file is read.
                    fcntl.flock(file, fcntl.LOCK_SH)
                    tokens = np.memmap(file, index.dtype, mode="r", shape=(index.total,))
        except OSError as error:
            raise NoRoomError(_why_no_cache(cache_dir, error)) from None
        check_digest(section.digest, index.digest, data_path or section.source.removeprefix("text:"))
        return cls(tokens[: index.train], tokens[index.train :], section)

    def draw(self, run_id: str, peer: str, round: int, step: int, count: int) -> np.ndarray:  # noqa: A002
        """`count` training windows, int64 of shape (count, context_length + 1).

        The same arguments give the same windows on the same text: their starts come from BLAKE3 of the
        arguments and are uniform over all starts.
        """
        seed = json.dumps([run_id, peer, round, step]).encode()
        raw = np.frombuffer(blake3(seed).digest(length=8 * count), "<u8")
        # 64 bits against a few billion starts: the bias of the remainder is below 1e-9
        return self._windows(self.train, raw % np.uint64(len(self.train) - self.window_length + 1))

    def validation_windows(self) -> np.ndarray:
        """The held-out windows, int64 of shape (validation_samples, context_length + 1), evenly spread."""
        last = len(self.validation) - self.window_length
        count = self._validation_samples
        starts = np.arange(count, dtype=np.int64) * last // max(count - 1, 1)
        return self._windows(self.validation, starts)

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        windows = np.empty((len(starts), self.window_length), np.int64)
        for row, start in zip(windows, starts.tolist(), strict=True):
            row[:] = tokens[start : start + self.window_length]
        return windows


def _cache_key(found: list[Document], section: DataSection, tokenizer: Tokenizer) -> str:
    """Names the token file of this text, as far as that can be told without reading it."""
    what = {
        "format": _FORMAT,
        "files": [[d.name, str(d.path.absolute()), d.size, d.modified_ns] for d in found],
        "tokenizer": tokenizer.digest,
        "split": [section.validation_fraction, section.context_length],
    }
    return str(blake3(json.dumps(what).encode()).hexdigest()[:32])


def cached_bytes(section: DataSection, tokenizer: Tokenizer, cache_dir: Path, data_path: str = "") -> int:
    """What this text's tokens take in the cache; 0 if they are not there. Raises DataError if the text is missing."""
    found = documents(section.source, data_path)
    tokens_file = cache_dir / f"{_cache_key(found, section, tokenizer)}.tokens"
    return tokens_file.stat().st_size if _load_index(tokens_file) else 0


def split(found: list[Document], section: DataSection) -> tuple[list[Document], list[Document]]:
    """(training, validation) of two or more documents.

    A document is held out if the hash of its name falls below the fraction: peers with slightly different
    copies of a text then agree on what is held out. If that is less than a window, the documents with the
    next higher hashes are held out too; one document always remains for training.
    """
    ranked = sorted(found, key=_rank)
    wanted = _BYTES_A_TOKEN * (section.context_length + 1)
    held = held_bytes = 0
    for document in ranked[:-1]:
        if _rank(document) >= section.validation_fraction and held_bytes >= wanted:
            break
        held += 1
        held_bytes += document.size
    return sorted(ranked[held:]), sorted(ranked[:held])


def _rank(document: Document) -> float:
    """A number in [0, 1) from a document's name."""
    return int.from_bytes(blake3(os.fsencode(document.name)).digest(length=6), "little") / 2**48


def _build(
    file: Path, found: list[Document], section: DataSection, tokenizer: Tokenizer, progress: Progress | None
) -> _Index:
    """Tokenize everything into `file`; the index is written last, so a file without one is not finished."""
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("wb") as stream:
            index = _Writer(stream, tokenizer, sum(d.size for d in found), progress).write(found, section)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        temporary.write_text(json.dumps(asdict(index)), encoding="utf-8")
        temporary.replace(file.with_suffix(".json"))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return index


class _Writer:
    """Appends the tokens of documents to an open file."""

    def __init__(self, stream: BinaryIO, tokenizer: Tokenizer, total_bytes: int, progress: Progress | None) -> None:
        self._stream = stream
        self._tokenizer = tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._total_bytes, self._done_bytes = total_bytes, 0
        self._progress = progress
        self._digests: dict[str, bytes] = {}

    def write(self, found: list[Document], section: DataSection) -> _Index:
        """Write training tokens, then held-out ones; a single document is cut, its tail held out."""
        if len(found) == 1:
            total = self._document(found[0])
            held = max(int(total * section.validation_fraction), section.context_length + 1)
            train = max(0, total - held)
        else:
            training, validation = split(found, section)
            train = sum(self._document(document) for document in training)
            total = train + sum(self._document(document) for document in validation)
        return _Index(self._dtype.str, train, total, combined_digest(self._digests))

    def _document(self, document: Document) -> int:
        """Write one document and its end mark; returns the number of tokens."""
        hasher = blake3()
        count = 0
        for piece in read_pieces(document):
            hasher.update(piece)
            count += self._tokens(self._tokenizer.encode(piece))
            self._done_bytes += len(piece)
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)
        self._digests[document.name] = hasher.digest()
        return count + self._tokens(np.array([self._tokenizer.end_of_text]))

    def _tokens(self, ids: np.ndarray) -> int:
        self._stream.write(ids.astype(self._dtype).data)
        return len(ids)


def _load_index(file: Path) -> _Index | None:
    """The index of a finished token file; None if there is none or the file is cut off."""
    try:
        index = _Index(**json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))
        complete = file.stat().st_size == index.total * np.dtype(index.dtype).itemsize
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return index if complete else None


_LOCK_EVERY_S = 0.5


@contextlib.contextmanager
def _locked(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock between processes; the system releases it when its holder dies. waiting: called meanwhile."""
    with file.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()  # another process reads the same text; a lock has no event to wait for
                time.sleep(_LOCK_EVERY_S)
        yield


def _why_no_cache(cache_dir: Path, error: OSError) -> str:
    what = f"The tokenised text cannot be kept in {cache_dir}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}: the disk or a quota is full; free some space or choose another folder with P2PLLM_CACHE."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}: writing there is not permitted; allow it or choose another folder with P2PLLM_CACHE."
    return f"{what}: {error.strerror or error}."
