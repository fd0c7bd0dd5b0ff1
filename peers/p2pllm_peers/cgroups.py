"""Control groups: the limits that a container or a service puts on its programs; Linux alone has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OURS = Path("/proc/self/cgroup")


def groups(controller: str, ours: Path | None = None, root: Path | None = None) -> Iterator[tuple[Path, int]]:
    """(folder, version of its files, 1 or 2) of each group that holds us and may limit what `controller` counts.

    A container sees its own group as the root, whatever `ours` says, so the path is walked to its end.
    """
    ours, root = ours or OURS, root or ROOT
    for line in read(ours).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        group = base / path.strip("/")
        while group.is_relative_to(base):
            yield group, 1 if controllers else 2
            group = group.parent


def read(file: Path) -> str:
    """Its text without white space around it; empty if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
