"""Shared by all tests: a machine of its own for a peer, from which nothing escapes."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings

from p2pllm.testing.plugin import Machine
from p2pllm_cli.main import main

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("steady")  # property tests draw the same examples in every run

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

    def p2pllm_here(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """The same in this process, for a command that ends at once: most of its time would go into imports."""
        command = ["p2pllm", *map(str, arguments)]
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.variables | variables, clear=True),
            mock.patch.object(sys, "argv", command),
            contextlib.chdir(self.folder),
            _signals_as_they_are(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main()
        return subprocess.CompletedProcess(command, end.value.code, out.getvalue(), err.getvalue())

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
        """Run a command in this process that must fail with one clear sentence that holds all the `words`."""
        self.check_refused(self.p2pllm_here(*arguments, **variables), code, words)

    @staticmethod
    def check_refused(result: subprocess.CompletedProcess[str], code: int, words: list[str]) -> None:
        """A command has failed with this exit code and one clear sentence that holds all the `words`."""
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


@contextlib.contextmanager
def _signals_as_they_are() -> Iterator[None]:
    """What commands do with signals ends with them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
def peer_env(make_peer_env: Callable[[], PeerEnv]) -> Iterator[PeerEnv]:
    """A machine of its own for one test; ended with the test."""
    env = make_peer_env()
    yield env
    env.clean()
