"""The protocol page says what the code does: its numbers, its methods, and all modules."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import p2pllm.rounds

FOLDER = Path(p2pllm.rounds.__file__).parent
PAGE = (FOLDER / "README.md").read_text()


def test_the_bounds_are_those_of_the_code() -> None:
    stated = re.findall(r"`([a-z_.]+)\.([A-Z_]+)` (\d+(?:\.\d+)?)", PAGE)
    assert len(stated) >= 20
    for module, name, value in stated:
        found: Any = getattr(importlib.import_module(f"p2pllm.{module}"), name)
        assert found == float(value), f"{module}.{name}"


def test_every_method_that_is_named_is_there() -> None:
    classes = {
        name: found
        for module in FOLDER.glob("*.py")
        for name, found in vars(importlib.import_module(f"p2pllm.rounds.{module.stem}")).items()
        if isinstance(found, type)
    }
    named = re.findall(r"`([A-Z]\w+)\.(_?[a-z]\w+)`", PAGE)
    assert len(named) >= 9
    assert [f"{kind}.{method}" for kind, method in named if not hasattr(classes[kind], method)] == []


def test_every_module_has_its_place() -> None:
    place = PAGE[PAGE.index("## Where it is") :]
    modules = {module.stem for module in FOLDER.glob("*.py")} - {"__init__"}
    assert {module for module in modules if not re.search(rf"`{module}(\.py)?`", place)} == set()
