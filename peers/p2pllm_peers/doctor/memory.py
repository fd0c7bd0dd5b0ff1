"""Memory that is free for us: what the machine has, and what a container or a service leaves of it.

What does not live here: what a run needs (`sizes`).
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OURS = Path("/proc/self/cgroup")

_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files with the limit and with what is used, and how memory.stat calls files that the kernel can drop."""


def free_memory() -> int:
    """Bytes that programs can still have without swapping, and without being killed for it."""
    return max(0, min([int(psutil.virtual_memory().available), *_left_by_limits(_OURS, _CGROUPS)]))


def _left_by_limits(ours: Path, root: Path) -> list[int]:
    """Bytes left in each control group that holds us and has a limit; Linux alone has them.

    A container sees its own group as the root, whatever `ours` says, so the path is walked to its end.
    """
    found = []
    for line in _read(ours).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = (root / "memory", _VERSION_1) if controllers else (root, _VERSION_2)
        group = base / path.strip("/")
        while group.is_relative_to(base):
            limit, used = (_read(group / name).strip() for name in names[:2])
            if limit.isdecimal() and used.isdecimal():  # "max" is no limit
                droppable = re.search(rf"^{names[2]} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                found.append(int(limit) - int(used) + (int(droppable[1]) if droppable else 0))
            group = group.parent
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
