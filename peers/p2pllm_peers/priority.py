"""Priority: how far a worker stands back for whoever else wants processor, disk and memory, the daemon included.

The daemon sets it from outside, so that it can change while a step computes. What does not live here: how much of the
processor a peer takes where nobody else wants it (`throttle`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def stand_back(pid: int, nice: int, io_idle: bool) -> bool:
    """Give a process of ours this niceness, 0 to 19, or our own if that is higher, and its place at the disk.

    Returns False if the system does not let it have a higher priority than it has now, as systems do for all but root;
    then its niceness is as it was. A process that has ended is left alone.
    """
    _at_the_disk(pid, io_idle)
    wanted = max(nice, os.getpriority(os.PRIO_PROCESS, 0))
    try:
        for _ in range(2):  # the second time for threads that others made meanwhile, which are like their makers
            for thread in _threads(pid):
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.setpriority(os.PRIO_PROCESS, thread, wanted)
    except PermissionError:
        return False
    with contextlib.suppress(OSError):  # not on macOS, and not where the kernel does not group by session
        Path(f"/proc/{pid}/autogroup").write_text(str(wanted))
    return True


def offer(pid: int) -> None:
    """If memory runs out, the system shall end this process of ours, and not the daemon or what else runs here."""
    with contextlib.suppress(OSError):  # Linux has this
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _at_the_disk(pid: int, io_idle: bool) -> None:
    """It reads only while nobody else does, or like ourselves. Linux alone knows such a thing, for each thread."""
    if not hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        return
    own_class, own_value = psutil.Process().ionice()
    for thread in _threads(pid):
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(thread)
            process.ionice(psutil.IOPRIO_CLASS_IDLE) if io_idle else process.ionice(own_class, own_value)


def _threads(pid: int) -> list[int]:
    """Where niceness belongs to threads, their ids; the main one comes first. Elsewhere the process's own."""
    with contextlib.suppress(OSError):
        return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    return [pid]
