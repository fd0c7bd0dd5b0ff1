"""What only a daemon finds out to be wrong: one sentence, the right exit code, and nothing left behind."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pllm.invite import Invite

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

CLOSED_PORT = 1
"""Nothing listens there on a machine that tests run on."""


@pytest.fixture(scope="module")
def founder(make_peer_env):
    """A peer that founded the tiny run and trains alone; its invite is in `ready`."""
    env = make_peer_env()
    started = env.p2pllm("start", env.write_run(), "--detach")
    assert started.returncode == 0, started.stderr
    (facts,) = env.home.glob("runs/*/founder/daemon.json")
    env.ready = json.loads(facts.read_text())
    yield env
    left = env.p2pllm("leave")
    assert left.returncode == 0, left.stderr
    assert env.left_behind() == []


@pytest.fixture(scope="module")
def stopped(make_peer_env):
    """A machine whose only peer has left before its first round was saved by schedule."""
    env = make_peer_env()
    assert env.p2pllm("start", env.write_run(), "--detach").returncode == 0
    assert env.p2pllm("leave").returncode == 0
    return env


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    """A file system of our own; skips where mounting is not permitted."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        # lazily: a failing test may have left a process in it, which is ended with its machine
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"llama"', '"lama"'), ["lama", "llama"]),
        (("hidden_size", "hiden_size"), ["model.config.hiden_size", "hidden_size"]),
        (("TEXT", "/nowhere/text"), ["/nowhere/text"]),
    ],
    ids=["type", "config-key", "missing-text"],
)
def test_run_that_cannot_be_built(peer_env, change: tuple[str, str], words: list[str]) -> None:
    peer_env.refuses(2, words, "start", peer_env.write_run(change))
    peer_env.keeps_nothing()


@pytest.mark.parametrize("content", [b"", b"\0\1\2" * 999], ids=["empty", "binary"])
def test_text_that_is_none(peer_env, content: bytes) -> None:
    path = peer_env.write_run()
    (peer_env.folder / "text.txt").write_bytes(content)
    peer_env.refuses(2, [str(peer_env.folder / "text.txt"), "empty, binary"], "start", path)
    peer_env.keeps_nothing()


def test_text_of_another_run(peer_env, founder) -> None:
    other = peer_env.folder / "other.txt"
    other.write_text("another text\n" * 500)
    words = [str(other), "not the text of this run"]
    peer_env.refuses(2, words, "join", founder.ready["invite"], "--data", other)
    peer_env.keeps_nothing(runs=True)  # the manifest is whole, so the next join with the right text needs no invite
    assert (next(peer_env.home.glob("runs/*")) / "manifest.json").exists()


def test_peer_of_another_run(peer_env, founder) -> None:
    known = Invite.decode(founder.ready["invite"])
    other = Invite("ab" * 32, known.founder, known.addresses).encode()
    peer_env.refuses(1, ["answers, but not for run abababababababab", "fresh invite"], "join", other)
    peer_env.keeps_nothing()


def test_nobody_at_the_addresses(peer_env, founder) -> None:
    known = Invite.decode(founder.ready["invite"])
    place = f"/ip4/127.0.0.1/tcp/{CLOSED_PORT}"
    alone = Invite(known.run_id, known.founder, (place,)).encode()
    peer_env.refuses(1, ["No peer can be reached", place, "fresh invite"], "join", alone, timeout=45)
    peer_env.keeps_nothing()


def test_somebody_else_at_the_address(peer_env, founder) -> None:
    from p2pllm.identity import Identity

    known = Invite.decode(founder.ready["invite"])
    place = known.addresses[0].partition("/p2p/")[0]
    stranger = Invite(known.run_id, Identity.generate().peer_id, (place,)).encode()
    peer_env.refuses(1, ["No peer can be reached", place], "join", stranger, timeout=45)
    peer_env.keeps_nothing()


def test_port_in_use(peer_env, founder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        peer_env.refuses(1, [f"Port {port}", "in use"], "join", founder.ready["invite"], "--port", port)
    peer_env.keeps_nothing()


def test_address_of_another_machine(peer_env, founder) -> None:
    words = ["cannot listen on 192.0.2.7"]
    peer_env.refuses(2, words, "join", founder.ready["invite"], "--listen", "192.0.2.7")
    peer_env.keeps_nothing()


def test_second_join_by_the_same_name(founder) -> None:
    before = len(founder.processes())
    words = ["already takes part", "p2pllm status", "--name"]
    founder.refuses(1, words, "join", founder.ready["invite"], "--name", "founder")
    assert len(founder.processes()) == before
    assert json.loads(founder.p2pllm("status", "--json").stdout)["round"] >= 0


def test_home_inside_a_file(peer_env) -> None:
    path = peer_env.write_run()
    peer_env.refuses(1, [str(path / "home")], "start", path, "--home", path / "home")
    peer_env.refuses(2, ["is a file", "--home"], "status", "--home", path)
    peer_env.keeps_nothing()


def test_home_that_cannot_be_written(peer_env, founder) -> None:
    with tmpfs(peer_env.home, "ro,size=64k"):
        peer_env.refuses(1, [str(peer_env.home), "Read-only"], "join", founder.ready["invite"])
        peer_env.keeps_nothing()


def test_home_that_is_full(peer_env, founder) -> None:
    with tmpfs(peer_env.home, "size=64k"):
        fill(peer_env.home)
        peer_env.refuses(1, [str(peer_env.home), "No space left"], "join", founder.ready["invite"])
        peer_env.keeps_nothing()


def fill(folder: Path) -> None:
    with (folder / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_home_that_becomes_full(peer_env) -> None:
    with tmpfs(peer_env.home, "size=2m"):
        assert peer_env.p2pllm("start", peer_env.write_run(), "--detach").returncode == 0
        fill(peer_env.home)
        reached = current_round(peer_env) + 20  # two saves and twenty records that the disk does not take
        end = time.monotonic() + 30
        while current_round(peer_env) < reached:
            assert time.monotonic() < end, "it does not train on"
        (peer_env.home / "filling").unlink()
        assert peer_env.p2pllm("leave").returncode == 0
        assert list(peer_env.home.glob("runs/*/founder/state/*.safetensors"))
        peer_env.keeps_nothing(runs=True)


def current_round(env) -> int:
    return json.loads(env.p2pllm("status", "--json").stdout).get("round", 0)


def test_key_that_others_may_read(peer_env, founder) -> None:
    key = peer_env.home / "keys" / "volunteer.key"
    key.parent.mkdir(parents=True)
    key.write_bytes(bytes(68))
    key.chmod(0o644)
    peer_env.refuses(1, [f"chmod 600 {key}"], "join", founder.ready["invite"])
    peer_env.keeps_nothing()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_runtime_folder_of_somebody_else(peer_env, founder) -> None:
    os.chown(peer_env.runtime, 12345, 12345)
    words = [str(peer_env.runtime), "XDG_RUNTIME_DIR"]
    peer_env.refuses(2, words, "join", founder.ready["invite"], "--detach")
    peer_env.keeps_nothing()


def test_run_that_is_stopped(stopped) -> None:
    run_id = next(stopped.home.glob("runs/*")).name
    assert stopped.p2pllm("status").stdout == f"run {run_id} as 'founder': stopped\n"
    assert json.loads(stopped.p2pllm("status", "--json").stdout)["phase"] == "stopped"
    stopped.refuses(1, ["'founder' is not running", run_id], "leave")
    assert "building the model" in stopped.p2pllm("logs").stdout
    assert stopped.p2pllm("logs", "-n", "0").stdout == ""
    assert stopped.p2pllm("generate", "--tokens", "5", "--prompt", "little").stdout.startswith("little")


def test_export_into_a_folder_with_something_in_it(stopped) -> None:
    folder = stopped.folder / "model"
    folder.mkdir()
    (folder / "precious").write_text("work")
    stopped.refuses(2, [str(folder), "empty"], "export", folder)
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_run_or_name_that_is_not_there(stopped) -> None:
    for command in (["status"], ["leave"], ["export", "folder"]):
        stopped.refuses(2, ["begins with zz", "p2pllm status"], *command, "--run", "zz")
        stopped.refuses(2, ["'nobody'", "p2pllm status"], *command, "--name", "nobody")
    stopped.refuses(2, ["begins with zz", "p2pllm status"], "join", "--run", "zz")
