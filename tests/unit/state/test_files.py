"""Files: what is on the disk before a name appears, and the same answers from memory."""

from __future__ import annotations

import os
import stat
from errno import EACCES, EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path

import pytest

from p2pllm.errors import StateError
from p2pllm.state.files import DiskFolder, explained, folder_at


@pytest.mark.parametrize("way", ["put", "publish"])
def test_a_name_appears_after_its_bytes_and_is_durable_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Else a power cut could leave a name without its bytes, or forget the name."""
    done = list[str]()
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        status = os.fstat(handle)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        fsync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        done.append("name")
        return replace(self, target)

    folder = DiskFolder(tmp_path, read_only=False)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    if way == "put":
        folder.put("whole", [b"one", b"two"])
    else:
        folder.allocate("draft", 6)
        folder.write("draft", 0, b"onetwo")
        folder.publish("draft", "whole")
    assert done == ["6 bytes", "name", "folder"]
    assert (tmp_path / "whole").read_bytes() == b"onetwo"


def test_disk_and_memory_answer_alike(folder: Path | None) -> None:
    files = folder_at(folder, read_only=False)
    assert files.names() == [] and files.size("a") is None
    with files.open("a") as reader:
        assert reader is None
    files.put("a", [b"one", memoryview(b"two")])
    files.put("a", [b"three"])
    assert files.names() == ["a"] and files.size("a") == 5
    with files.open("a") as reader:
        assert reader is not None and reader.size == 5
        assert reader.read(1, 3) == b"hre"
        target = bytearray(2)
        reader.read_into(3, memoryview(target))
        assert target == b"ee"
        for at, size in ((0, 6), (5, 1), (9, 1)):
            with pytest.raises(StateError, match="too early"):
                reader.read(at, size)
            with pytest.raises(StateError, match="too early"):
                reader.read_into(at, memoryview(bytearray(size)))
        files.remove("a")
        assert reader.read(0, 5) == b"three", "what is open stays readable"
    files.remove("a")
    assert files.names() == []


def test_drafts_on_disk_and_in_memory_are_alike(folder: Path | None) -> None:
    files = folder_at(folder, read_only=False)
    assert not files.allocate("draft", 4)
    files.write("draft", 1, b"xy")
    assert files.allocate("draft", 4), "it is there, with what was written"
    with files.open("draft") as reader:
        assert reader is not None and reader.read(0, 4) == b"\0xy\0"
    assert not files.allocate("draft", 5), "another size begins again"
    files.write("draft", 0, b"hello")
    files.put("final", [b"older"])
    files.publish("draft", "final")
    assert files.names() == ["final"] and files.size("final") == 5
    for change in (lambda: files.write("draft", 0, b"x"), lambda: files.publish("draft", "final")):
        with pytest.raises(FileNotFoundError):
            change()


def test_every_failure_says_where_and_what_to_do() -> None:
    def sentence(code: int, needed: int | None) -> str:
        with pytest.raises(StateError) as caught:
            with explained("The state cannot be kept in /there", needed):
                raise OSError(code, os.strerror(code))
        return str(caught.value)

    assert sentence(ENOSPC, 2_000_001).startswith("The state cannot be kept in /there: the disk or a quota is full; ")
    assert "free 3 MB" in sentence(EDQUOT, 2_000_001)
    assert "not permitted" in sentence(EROFS, 0) and "`home`" in sentence(EACCES, 0)
    assert "permission to read it" in sentence(EACCES, None)
    assert sentence(EIO, 5).endswith("in /there: Input/output error.")
