"""Machine: what is found out without computing and without the network: versions, arithmetic, disk, text."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
from blake3 import blake3

from p2pllm import __version__
from p2pllm.errors import DataError, NoRoomError, P2PLLMError, StateError
from p2pllm.manifest import RunDraft
from p2pllm.network.p2pd import p2pd_file
from p2pllm.settings import PeerSettings
from p2pllm.state import check_arithmetic
from p2pllm.training.data import cached_bytes
from p2pllm.training.sources import Document, check_digest, documents, read_pieces, text_digest
from p2pllm.training.tokenizer import Tokenizer
from p2pllm_peers.folders import RunFolder, name_to_join_as
from p2pllm_peers.housekeeping import size_of

SAMPLE_BYTES = 1 << 20
"""Of the run's text that the worker computes with, at least."""

CHECKED_BYTES = 256 << 20
"""Text up to this size is compared with the run's digest; more would take longer than the doctor may."""


def versions() -> dict[str, str]:
    """Of the programs that a peer is made of. p2pd tells none, so it is named by the digest of its file."""
    found = {"p2pllm": __version__, "python": platform.python_version()}
    for name in ("hivemind", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(P2PLLMError, OSError):
        found["p2pd"] = str(blake3(p2pd_file().read_bytes()).hexdigest()[:12])
    return found


def arithmetic_problem() -> str:
    """ "" if this machine computes the outer step as others do, else a sentence."""
    try:
        check_arithmetic()
    except StateError as error:
        return str(error)
    return ""


def check_writable(path: Path) -> None:
    """Raises NoRoomError if this user can keep no files in that folder."""
    there = _existing(path)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise NoRoomError(
            f"Nothing can be written to {there}; mend that, or choose another folder, with --home for runs and "
            f"P2PLLM_CACHE for tokenised text."
        )


def free_disk(path: Path) -> tuple[int, int]:
    """(bytes free, device number) of where `path` lies or would lie."""
    there = _existing(path)
    return int(psutil.disk_usage(str(there)).free), there.stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or what there is of it."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def files_here(home: Path, run_id: str) -> int:
    """Bytes of the run's files that the peer has which a join of this run would start; run_id "": of none."""
    run = RunFolder(home, run_id)
    return size_of(run.peer(name_to_join_as(run)).path) if run_id else 0


def text_here(draft: RunDraft, settings: PeerSettings, tokenizer: Tokenizer) -> int:
    """Bytes of the run's text that are tokens on this machine already."""
    try:
        return cached_bytes(draft.data, tokenizer, settings.cache, settings.data_path)
    except DataError:
        return 0


def find_text(draft: RunDraft, settings: PeerSettings) -> tuple[list[Document], str]:
    """The run's text on this machine, and what is wrong with it: a sentence, or ""."""
    try:
        found = documents(draft.data.source, settings.data_path)
        if draft.data.digest and sum(document.size for document in found) <= CHECKED_BYTES:
            check_digest(draft.data.digest, text_digest(found), settings.data_path or draft.data.source)
    except DataError as error:
        return [], str(error)
    return found, ""


def write_sample(found: Iterable[Document], context_length: int, file: Path) -> int:
    """Write the beginning of a text, enough for every window to be another one; returns its bytes."""
    wanted = max(SAMPLE_BYTES, 16 * (context_length + 1))
    with file.open("wb") as stream:
        for piece in itertools.chain.from_iterable(map(read_pieces, found)):
            stream.write(piece[: wanted - stream.tell()])
            if stream.tell() >= wanted:
                break
        return stream.tell()


def tokenised_bytes(found: Iterable[Document], sample: Path, tokenizer: Tokenizer) -> int:
    """About what the whole text takes once it is tokens: as many for each byte as in the sample."""
    piece = sample.read_bytes()[: SAMPLE_BYTES // 4]
    tokens = len(tokenizer.encode(piece)) / max(1, len(piece))
    item = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4").itemsize
    return int(tokens * item * sum(document.size for document in found))
