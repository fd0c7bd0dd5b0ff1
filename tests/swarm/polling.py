"""Waiting for what real processes do: by looking, never by a sleep that hopes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

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
