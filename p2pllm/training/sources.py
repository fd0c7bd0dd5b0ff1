"""Sources of text: which documents a manifest's data section names on this machine, and their digest.

Imports neither torch nor transformers. What does not live here: tokens and windows (`data`).
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from p2pllm.errors import DataError

_PIECE = 1 << 20  # bytes read at once
_PROBE = 8192  # bytes in which a NUL marks a file as binary, as git does
_SKIPPED_OF_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
_SINGLE = "text"

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all), called now and then from the thread that works."""


class Document(NamedTuple):
    """One text file. `name` is the same on every machine: a path relative to the source, with slashes."""

    name: str
    path: Path
    size: int
    modified_ns: int


def documents(source: str, data_path: str = "") -> list[Document]:
    """The text files of a manifest's `data.source`, sorted by name.

    source: "stdlib", or "text:PATH" with the path of a file, a folder (all below it) or a glob. data_path:
    what to read instead of PATH; "" means PATH. Empty, binary and unreadable files are left out, and so are
    hidden ones below a folder. A single file is always named "text", so that a renamed copy is the same
    text. Raises DataError if nothing is left.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = _collect(root, _walk(root, _SKIPPED_OF_STDLIB, ".py"))
        if not found:
            raise DataError(f"There is no Python source in {root}; use a text: source instead.")
        return found
    where = data_path or source.removeprefix("text:")
    found = _named(where)
    if not found:
        raise DataError(f'There is no readable text at "{where}"; {_advice(where)}.')
    return found


def text_digest(found: Iterable[Document], progress: Progress | None = None) -> str:
    """BLAKE3 over names and contents, 64 hex digits. Raises DataError if a document cannot be read."""
    found = list(found)
    total = sum(document.size for document in found)
    digests, done = {}, 0
    for document in found:
        hasher = blake3()
        for piece in read_pieces(document):
            hasher.update(piece)
            done += len(piece)
            if progress is not None:
                progress(done, total)
        digests[document.name] = hasher.digest()
    return combined_digest(digests)


def combined_digest(digests: dict[str, bytes]) -> str:
    """`text_digest` of documents from {name: BLAKE3 of the content}, for who reads them in another order."""
    hasher: Any = blake3()
    for name in sorted(digests):
        encoded = os.fsencode(name)
        hasher.update(len(encoded).to_bytes(8, "little") + encoded + digests[name])
    return str(hasher.hexdigest())


def check_digest(section_digest: str, found: str, where: str) -> None:
    """Raise DataError if the run names a text (`section_digest` is not "") and `found` is not its digest."""
    if section_digest and section_digest != found:
        raise DataError(
            f"The text at {where} is not the text of this run (its digest is {found[:16]}, the run's is "
            f"{section_digest[:16]}); get the organiser's copy and name its place with `data_path`."
        )


def read_pieces(document: Document) -> Iterator[bytes]:
    """The content in pieces of about 1 MiB that end with a line where possible.

    The cuts depend on the content alone, so that all peers make the same tokens of it. Raises DataError if
    the file cannot be read.
    """
    try:
        with document.path.open("rb") as stream:
            rest = b""
            while block := stream.read(_PIECE):
                rest += block
                cut = rest.rfind(b"\n") + 1 or len(rest)
                yield rest[:cut]
                rest = rest[cut:]
            if rest:
                yield rest
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"The text file {document.path} cannot be read: {reason}.") from None


def _named(where: str) -> list[Document]:
    path = Path(where).expanduser()
    if path.is_dir():
        return _collect(path, _walk(path, frozenset(), ""))
    if path.is_file():
        return [document._replace(name=_SINGLE) for document in _collect(path.parent, [path])]
    if not glob.has_magic(where):
        return []
    fixed = path.parts[: _first_magic(path.parts)]
    root = Path(*fixed) if fixed else Path()
    pattern = str(Path(*path.parts[len(fixed) :]))
    return _collect(root, (file for file in root.glob(pattern) if file.is_file()))


def _first_magic(parts: tuple[str, ...]) -> int:
    return next(index for index, part in enumerate(parts) if glob.has_magic(part))


def _walk(root: Path, skipped: frozenset[str], suffix: str) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in files:
            if name.endswith(suffix) and not name.startswith("."):
                yield Path(folder, name)


def _collect(root: Path, paths: Iterable[Path]) -> list[Document]:
    found = []
    for path in paths:
        try:
            if not _is_text(path):
                continue
            status = path.stat()
        except OSError:
            continue
        name = path.relative_to(root).as_posix()
        found.append(Document(name, path, status.st_size, status.st_mtime_ns))
    return sorted(found)


def _is_text(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(_PROBE)
    return bool(start) and b"\0" not in start


def _advice(where: str) -> str:
    path = Path(where).expanduser()
    if path.exists():
        return "what is there is empty, binary, or may not be read"
    return "correct data.source in the run file, or give its place on this machine with --data"
