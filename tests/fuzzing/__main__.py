"""Runs a target with inputs that atheris makes up: `python -m fuzzing TARGET|all [SECONDS|FILE]`, see `scripts/fuzz`.

What was found worth keeping stays in out/fuzz/TARGET/corpus, and the next run goes on from there. It ends at the first
broken promise with exit code 77, and the input is in out/fuzz/TARGET/; give that FILE to see it again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import atheris

# It names every module that it instruments, about a hundred.
with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["p2pllm", "multiaddr"]):
    from fuzzing.targets import TARGETS

from fuzzing.bombs import BOMBS, loaded
from fuzzing.mutate import changed
from fuzzing.promise import Target

OUT = Path(__file__).resolve().parents[2] / "out" / "fuzz"
SECONDS = 60
MEMORY = Path("/dev/shm")  # noqa: S108 - for files that a target syncs; without it they go where others' go
HANG_S = 20
"""Wall time after which an input has no end. Those that only take too long are found by their CPU time before."""


def main(arguments: list[str]) -> int:
    """Exit code of the command."""
    name, what = (*arguments, "", "")[:2]
    is_known = len(arguments) < 3 and (name == "all" or name in TARGETS)
    if not is_known or not (what == "" or what.isdecimal() or Path(what).is_file()):
        known = ", ".join(TARGETS)
        sys.stderr.write(f"fuzz: give one of all, {known}, and seconds or a file: scripts/fuzz all 60.\n")
        return 2
    if name == "all":  # one process each: libFuzzer ends the one it runs in
        commands = [[sys.executable, "-m", "fuzzing", each, *arguments[1:]] for each in TARGETS]
        codes = [subprocess.run(command, check=False).returncode for command in commands]
        return int(any(codes))
    _fuzz(TARGETS[name], what)
    return 0


def _fuzz(target: Target, what: str) -> None:
    logging.disable()  # what is refused is logged, which is right, and slow
    if MEMORY.is_dir():
        tempfile.tempdir = str(MEMORY)
    folder = OUT / target.name
    for place in ("corpus", "seeds"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    bombs = (data for bomb in BOMBS.values() for data in loaded(bomb, target))
    for number, seed in enumerate((*target.seeds(), *bombs)):
        (folder / "seeds" / str(number)).write_bytes(seed)
    inputs = [what] if what and not what.isdecimal() else [str(folder / "corpus"), str(folder / "seeds")]
    limits = [
        f"-max_total_time={what if what.isdecimal() else SECONDS}",
        f"-max_len={target.max_bytes}",
        f"-timeout={HANG_S}",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
    ]

    def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
        draw = random.Random(seed)
        other = changed(data, draw, is_json=target.is_json) if draw.random() < 0.8 else None
        return other if other is not None and len(other) <= max_bytes else bytes(atheris.Mutate(data, max_bytes))

    target.begin()
    tracemalloc.start()
    atheris.Setup([sys.argv[0], *limits, *inputs], lambda data: target.keep(data) and None, custom_mutator=mutate)
    atheris.Fuzz()


sys.exit(main(sys.argv[1:]))
