"""Memory that is free for us: what the machine has, and what a container or a service leaves of it.

What does not live here: what a run needs (`sizes`).
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from p2pllm_peers.cgroups import groups, read

_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files with the limit and with what is used, and how memory.stat calls files that the kernel can drop."""


def free_memory() -> int:
    """Bytes that programs can still have without swapping, and without being killed for it."""
    return max(0, min([int(psutil.virtual_memory().available), *_left_by_limits()]))


def _left_by_limits(ours: Path | None = None, root: Path | None = None) -> list[int]:
    """Bytes left in each control group that holds us and has a limit."""
    found = []
    for group, version in groups("memory", ours, root):
        names = _VERSION_1 if version == 1 else _VERSION_2
        limit, used = (read(group / name) for name in names[:2])
        if limit.isdecimal() and used.isdecimal():  # "max" is no limit
            droppable = re.search(rf"^{names[2]} (\d+)$", read(group / "memory.stat"), re.MULTILINE)
            found.append(int(limit) - int(used) + (int(droppable[1]) if droppable else 0))
    return found
