"""A scenario file for tests, and how to change and write it."""

from __future__ import annotations

from pathlib import Path

GOOD = """
about = "for tests"
duration_s = 100
alone_s = 5

[run.round]
samples = 8

[links.home]
up_mbit = 20
down_mbit = 100
delay_ms = [20, 60]

[[peers]]
name = "home"
count = 2
cores = 0.5
link = "home"

[[peers]]
name = "late"
link = "home"
start_s = 20
disk_mb = 64
"""
"""Peers home-0 and home-1, and late, which joins at 20 s and has a disk of its own."""


def written(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def event(do: str, at_s: float = 30, **fields: object) -> str:
    """An [[events]] in TOML; fields are given as TOML writes them."""
    lines = [f"{name} = {value}" for name, value in fields.items()]
    return "\n".join(["[[events]]", f"at_s = {at_s}", f'do = "{do}"', *lines, ""])


def waiting(do: str, phase: str = '"vote"', **fields: object) -> str:
    """One that waits for a phase."""
    lines = [f"{name} = {value}" for name, value in ({"do": f'"{do}"', "phase": phase} | fields).items()]
    return "\n".join(["[[events]]", *lines, ""])
