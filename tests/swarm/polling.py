"""Waiting for what real processes do: by looking, never by a sleep that hopes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import pytest

HARD_LIMIT_S = 60.0
"""Longest wait; it fails the test and is no measurement."""

EVERY_S = 0.05

Found = TypeVar("Found")


def until(condition: Callable[[], Found], what: str, limit: float = HARD_LIMIT_S) -> Found:
    """Poll until the condition gives something true, and return that; fail after `limit` seconds."""
    end = time.monotonic() + limit
    while not (found := condition()):
        if time.monotonic() >= end:
            pytest.fail(f"not within {limit:.0f} s: {what}")
        time.sleep(EVERY_S)
    return found


def lives(process: psutil.Process) -> bool:
    """It has not ended; one that only its parent has not collected has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two questions
        return False
