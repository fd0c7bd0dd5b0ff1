"""What a daemon finds wrong on its way into a run: one sentence, the right exit code, and nothing left behind.

All is real, but daemons and workers live in this process: most of a start would go into loading their libraries again.
Those in processes of their own are in `tests/swarm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from p2pllm.errors import P2PLLMError
from p2pllm.identity import Identity
from p2pllm.invite import Invite
from p2pllm.manifest import load_draft
from p2pllm.network.node import Node, NodeSettings
from p2pllm_peers import daemon, launcher, orders, worker_process
from p2pllm_peers.crew import Crew
from p2pllm_peers.entry import serve_manifest
from p2pllm_peers.folders import FOUNDER, SIGNING_DOMAIN, PeerFolder, RunFolder
from p2pllm_peers.launcher import DaemonProcess, Order
from p2pllm_peers.pipe import Pipe
from p2pllm_peers.worker import Worker

CLOSED_PORT = 1
"""Nothing listens there on a machine that tests run on."""

LOCKS: list[int] = []
"""Of the daemon that lives now; a process of its own would take them along."""


class DaemonHere(DaemonProcess):
    """Lives as soon as it is made, until it fails, which every daemon of this module does."""

    def __init__(self, order: Order) -> None:
        self._order = order
        said = io.StringIO()
        with (
            mock.patch("sys.stdin", io.StringIO(order.to_json() + "\n")),
            contextlib.redirect_stdout(said),
            contextlib.suppress(SystemExit),
        ):
            daemon.main()
        while LOCKS:
            os.close(LOCKS.pop())
        said.seek(0)
        self._process: Any = SimpleNamespace(stdout=said, wait=lambda timeout: 0, poll=lambda: 1)


class WorkerHere:
    """Builds model and data, as far as it gets. What `compute` asks of a WorkerProcess."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self.killed = False
        self._ended = asyncio.Event()

    @classmethod
    async def launch(cls, memory: int, runtime_dir: Path, on_event: Callable[[dict[str, Any]], None]) -> WorkerHere:
        return cls(on_event)

    async def send(self, *commands: dict[str, Any]) -> None:
        (command,) = commands
        if "draft" not in command:
            self._ended.set()
            return
        with pytest.raises(P2PLLMError) as caught:
            Worker(Pipe(io.StringIO(), io.StringIO(), ""), command, Crew())
        self._on_event({"event": "error", "kind": type(caught.value).__name__, "message": str(caught.value)})

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    def kill(self) -> None:
        self._ended.set()


@pytest.fixture
def machine(peer_env, monkeypatch: pytest.MonkeyPatch):
    """A machine whose daemons and workers live in this process, and leave it as it was."""
    lock = PeerFolder.lock
    monkeypatch.setattr(PeerFolder, "lock", lambda folder: LOCKS.append(lock(folder)) or LOCKS[-1])
    monkeypatch.setattr(launcher, "DaemonProcess", DaemonHere)
    monkeypatch.setattr(worker_process, "WorkerProcess", WorkerHere)
    monkeypatch.setattr(orders, "log_into", lambda path: None)
    peer_env.variables |= {"P2PLLM_NICE": "0", "P2PLLM_THREADS": "0"}
    return peer_env


@pytest.fixture(scope="module")
def invite(make_peer_env) -> Iterator[Invite]:
    """That of a peer which gives out the manifest of the tiny run, and does nothing else."""
    env = make_peer_env()
    identity = Identity.load_or_create(env.folder / "key")
    draft = load_draft(env.write_run())
    manifest = draft.seal(founder=identity.peer_id, initial_state="5a" * 32, tokenizer="bytes", data_digest="ab" * 32)
    sealed = manifest, identity.sign(SIGNING_DOMAIN, manifest.canonical_bytes()), None

    async def start() -> Node:
        node = await Node.start(identity, manifest.run_id, env.runtime / "node", NodeSettings())
        await serve_manifest(node, sealed)
        return node

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)  # commands and their daemons need this one
    thread.start()
    try:
        node = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
        yield Invite(manifest.run_id, identity.peer_id, tuple(node.addresses()))
        asyncio.run_coroutine_threadsafe(node.stop(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def an_invite() -> str:
    """Of nobody; for what goes wrong before anybody is asked."""
    return Invite("ab" * 32, Identity.generate().peer_id, (f"/ip4/127.0.0.1/tcp/{CLOSED_PORT}",)).encode()


# -- the run file and its text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"llama"', '"lama"'), ["lama", "llama"]),
        (("hidden_size", "hiden_size"), ["model.config.hiden_size", "hidden_size"]),
        (("TEXT", "/nowhere/text"), ["/nowhere/text"]),
    ],
    ids=["type", "config-key", "missing-text"],
)
def test_run_that_cannot_be_built(machine, change: tuple[str, str], words: list[str]) -> None:
    machine.refuses(2, words, "start", machine.write_run(change), "--detach")
    machine.keeps_nothing()


@pytest.mark.parametrize("content", [b"", b"\0\1\2" * 999], ids=["empty", "binary"])
def test_text_that_is_none(machine, content: bytes) -> None:
    path = machine.write_run()
    (machine.folder / "text.txt").write_bytes(content)
    machine.refuses(2, [str(machine.folder / "text.txt"), "empty, binary"], "start", path, "--detach")
    machine.keeps_nothing()


def test_text_of_another_run(machine, invite: Invite) -> None:
    other = machine.folder / "other.txt"
    other.write_text("another text\n" * 500)
    words = [str(other), "not the text of this run"]
    machine.refuses(2, words, "join", invite.encode(), "--data", other, "--detach")
    machine.keeps_nothing(runs=True)  # the manifest is whole, so the next join with the right text needs no invite
    assert RunFolder(machine.home, invite.run_id).load() is not None


# -- the others --------------------------------------------------------------------------------------------------------


def test_peer_of_another_run(machine, invite: Invite) -> None:
    other = Invite("ab" * 32, invite.founder, invite.addresses).encode()
    machine.refuses(1, ["answers, but not for run abababababababab", "fresh invite"], "join", other, "--detach")
    machine.keeps_nothing()


def test_nobody_at_the_addresses(machine) -> None:
    words = ["No peer can be reached", f"/ip4/127.0.0.1/tcp/{CLOSED_PORT}", "fresh invite"]
    machine.refuses(1, words, "join", an_invite(), "--detach")
    machine.keeps_nothing()


def test_somebody_else_at_the_address(machine, invite: Invite) -> None:
    place = invite.addresses[0].partition("/p2p/")[0]
    stranger = Invite(invite.run_id, Identity.generate().peer_id, (place,)).encode()
    machine.refuses(1, ["No peer can be reached", place], "join", stranger, "--detach")
    machine.keeps_nothing()


# -- this machine ------------------------------------------------------------------------------------------------------


def test_port_in_use(machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        machine.refuses(1, [f"Port {port}", "in use"], "join", an_invite(), "--port", port, "--detach")
    machine.keeps_nothing()


def test_address_of_another_machine(machine) -> None:
    machine.refuses(2, ["cannot listen on 192.0.2.7"], "join", an_invite(), "--listen", "192.0.2.7", "--detach")
    machine.keeps_nothing()


def test_second_peer_by_the_same_name(machine, invite: Invite) -> None:
    first = RunFolder(machine.home, invite.run_id).peer(FOUNDER)
    first.lock()
    held = LOCKS.pop()
    words = ["already takes part", "p2pllm status", "--name"]
    machine.refuses(1, words, "join", invite.encode(), "--name", FOUNDER, "--detach")
    assert first.running() is not None, "the first one goes on"
    os.close(held)


def test_home_inside_a_file(machine) -> None:
    path = machine.write_run()
    machine.refuses(1, [str(path / "home")], "start", path, "--home", path / "home", "--detach")
    machine.refuses(2, ["is a file", "--home"], "status", "--home", path)
    machine.refuses(1, [str(path), "--home"], "doctor", "--home", path / "home")
    machine.keeps_nothing()


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    """A file system of our own; skips where mounting is not permitted."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        # lazily: a failing test may have left a process in it, which is ended with its machine
        subprocess.run(["umount", "-l", path], check=True)


def test_home_that_cannot_be_written(machine) -> None:
    with tmpfs(machine.home, "ro,size=64k"):
        machine.refuses(1, [str(machine.home), "Read-only"], "join", an_invite(), "--detach")
        machine.refuses(1, [str(machine.home), "--home"], "doctor")
        machine.keeps_nothing()


def test_home_that_is_full(machine) -> None:
    with tmpfs(machine.home, "size=64k"):
        with (machine.home / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        machine.refuses(1, [str(machine.home), "No space left"], "join", an_invite(), "--detach")
        machine.keeps_nothing()


def test_key_that_others_may_read(machine) -> None:
    key = machine.home / "keys" / "volunteer.key"
    key.parent.mkdir(parents=True)
    key.write_bytes(bytes(68))
    key.chmod(0o644)
    machine.refuses(1, [f"chmod 600 {key}"], "join", an_invite(), "--detach")
    machine.keeps_nothing()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_runtime_folder_of_somebody_else(machine) -> None:
    os.chown(machine.runtime, 12345, 12345)
    machine.refuses(2, [str(machine.runtime), "XDG_RUNTIME_DIR"], "join", an_invite(), "--detach")
    machine.keeps_nothing()
