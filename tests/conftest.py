"""Shared by all tests: a machine of its own for a peer, from which nothing escapes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pllm.testing.plugin import Machine

TINY_RUN = """
name = "tiny"

[model]
type = "llama"

[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2

[data]
source = "text:TEXT"
context_length = 32
validation_samples = 4

[round]
rounds = 1000000
samples = 8
"""
"""A run whose model is built and whose text is read in no time. It never ends by itself."""


class PeerEnv(Machine):
    """The machine of one peer that stays on loopback, with the commands of its user."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.variables |= {"P2PLLM_LISTEN_HOST": "127.0.0.1", "P2PLLM_NAT": "false", "P2PLLM_THREADS": "1"}

    def p2pllm(self, *arguments: object, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command line to its end."""
        return subprocess.run(
            [sys.executable, "-m", "p2pllm_cli.main", *map(str, arguments)],
            env=self.variables | variables,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def write_run(self, *changes: tuple[str, str]) -> Path:
        """A run file of the tiny run, with its text; each change replaces one piece of it."""
        lines = (f"{number} little words about machines that train together" for number in range(2000))
        (self.folder / "text.txt").write_text("\n".join(lines))
        content = TINY_RUN
        for old, new in changes:
            assert content.count(old) == 1, f"{old!r} is not once in the tiny run"
            content = content.replace(old, new)
        path = self.folder / "run.toml"
        path.write_text(content.replace("TEXT", str(self.folder / "text.txt")))
        return path

    def refuses(self, code: int, words: list[str], *arguments: object, **variables: str) -> None:
        """Run a command that must fail with one clear sentence that holds all the `words`."""
        result = self.p2pllm(*arguments, **variables)
        assert result.returncode == code, result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        sentence = result.stderr.strip()
        assert sentence.startswith("p2pllm: ") and sentence.endswith("."), sentence
        for word in words:
            assert word in sentence, f"{word!r} is not in: {sentence}"
        for noise in ("Traceback", "Errno", "defect", "None", "Error("):
            assert noise not in sentence, sentence

    def keeps_nothing(self, *, runs: bool = False) -> None:
        """No process, no socket and, unless `runs`, no folder of a run."""
        assert self.left_behind() == []
        kept = [path.name for path in self.home.glob("runs/*")] if self.home.is_dir() else []
        assert runs or kept == [], kept


@pytest.fixture(scope="session")
def make_peer_env(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], PeerEnv]:
    """Makes machines for peers; whatever they left is ended with the session."""
    made = []

    def make() -> PeerEnv:
        made.append(PeerEnv(tmp_path_factory.mktemp("peer")))
        return made[-1]

    yield make
    for env in made:
        env.clean()


@pytest.fixture
def peer_env(make_peer_env: Callable[[], PeerEnv], monkeypatch: pytest.MonkeyPatch) -> PeerEnv:
    """A machine of its own for one test, whose variables hold in this process too; ended with the test."""
    env = make_peer_env()
    for name in os.environ:
        if name.startswith("P2PLLM_"):
            monkeypatch.delenv(name)
    for name, value in env.variables.items():
        monkeypatch.setenv(name, value)
    yield env
    env.clean()
