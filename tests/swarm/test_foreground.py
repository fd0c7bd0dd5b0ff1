"""`p2pllm start` in a terminal: what Ctrl+C does, once and twice, early and late."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]


class Terminal:
    """The command line in a terminal of 80 columns."""

    def __init__(self, env, *arguments: object) -> None:
        self._ours, theirs = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "p2pllm_cli.main", *map(str, arguments)],
            env=env.variables | {"TERM": "xterm", "COLUMNS": "80"},
            cwd=env.folder,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def read_until(self, words: str, within: float = 60) -> None:
        """Read what is shown until it holds `words`; what came before is forgotten."""
        end = time.monotonic() + within
        while words not in self.text:
            assert time.monotonic() < end, f"no {words!r} in: {self.text[-2000:]}"
            self.read(0.1)
        self.text = self.text.partition(words)[2]

    def interrupt(self) -> float:
        self.process.send_signal(signal.SIGINT)
        return time.monotonic()

    def wait(self, within: float) -> int:
        """The exit code; reads on, so that nothing blocks on a full terminal."""
        end = time.monotonic() + within
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it has not ended within {within} s: {self.text[-2000:]}"
            self.read(0.1)
        self.read(0)
        return self.process.returncode

    def read(self, wait: float) -> None:
        """Take what is shown within `wait` seconds."""
        while select.select([self._ours], [], [], wait)[0]:
            try:
                data = os.read(self._ours, 65536)
            except OSError:  # how Linux tells that the other side is closed
                data = b""
            if not data:
                time.sleep(wait)  # as long as a silent terminal would have taken
                return
            self.text += data.decode(errors="replace")
            wait = 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(5)
        os.close(self._ours)


@pytest.fixture
def terminal(peer_env):
    opened = []

    def open_one(*arguments: object) -> Terminal:
        opened.append(Terminal(peer_env, *arguments))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_ctrl_c_leaves_in_order_and_the_next_start_goes_on(peer_env, terminal) -> None:
    path = peer_env.write_run()
    screen = terminal("start", path)
    screen.read_until("Invite: p2pllm:")
    screen.read_until("█")  # the curve of the loss, so there is something to save
    began = screen.interrupt()
    assert screen.wait(20) == 0
    assert time.monotonic() - began < 10
    assert "Left run" in screen.text and "Traceback" not in screen.text
    assert peer_env.left_behind() == []
    assert list(peer_env.home.glob("runs/*/founder/state/*.safetensors"))

    again = terminal("start", path)
    again.read_until("Ctrl+C leaves")
    again.interrupt()
    assert again.wait(20) == 0


def test_a_second_ctrl_c_ends_even_a_daemon_that_hangs(peer_env, terminal) -> None:
    screen = terminal("start", peer_env.write_run())
    screen.read_until("Ctrl+C leaves")
    (facts,) = peer_env.home.glob("runs/*/founder/daemon.json")
    os.kill(json.loads(facts.read_text())["pid"], signal.SIGSTOP)
    began = screen.interrupt()
    while screen.process.poll() is None:  # signals that come too fast count once, so one more until it has heard two
        assert time.monotonic() - began < 10
        screen.interrupt()
        screen.read(0.01)  # a terminal that nobody reads would block it
    assert screen.process.returncode == 130
    assert peer_env.left_behind() == []


def test_ctrl_c_while_it_starts(peer_env, terminal) -> None:
    screen = terminal("start", peer_env.write_run())
    screen.read_until("starting p2pd")
    began = screen.interrupt()
    assert screen.wait(20) == 130
    assert time.monotonic() - began < 10
    assert "Traceback" not in screen.text
    assert peer_env.left_behind() == []


def test_a_killed_terminal_leaves_nothing(peer_env, terminal) -> None:
    screen = terminal("start", peer_env.write_run())
    screen.read_until("█")  # the curve of the loss, so there is something to save
    screen.process.kill()
    assert peer_env.left_behind(within=15) == []
    assert list(peer_env.home.glob("runs/*/founder/state/*.safetensors")), "the daemon left in order"
