"""Ledgers: everything in them can be undone, by whoever, and nothing else is touched."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.claims import Claims, release, release_after_death, sweep
from p2pllm_peers.lab.cleanup.undo import PATIENCE_S, alive, birth

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    made = Claims.open(tmp_path / "ledgers")
    yield made
    made.release()


@contextlib.contextmanager
def sleeper(*prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that would outlive the test."""
    with subprocess.Popen([*prefix, "sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], bool], within: float = PATIENCE_S) -> bool:
    """It becomes true within some seconds."""
    end = time.monotonic() + within
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def ignores(pid: int, number: int) -> bool:
    """The process has come to where it ignores that signal."""
    mask = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def make_folder(claims: Claims, path: Path) -> Path:
    claims.note("folder", str(path))
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text("x")
    return path


def abandon(ledger: Path) -> None:
    """As if the owner had died: its process id is somebody else's by now."""
    first, *others = ledger.read_text().splitlines(keepends=True)
    ledger.write_text(json.dumps(json.loads(first) | {"birth": "1"}) + "\n" + "".join(others))


def test_all_is_undone_and_repeating_it_does_no_harm(claims, tmp_path):
    folder = make_folder(claims, tmp_path / "made")
    with sleeper() as process:
        claims.note("process", str(process.pid))
        assert claims.left_over() == [f"folder {folder}", f"process {process.pid}"]
        assert claims.release() == []
        assert process.wait(5) == -signal.SIGKILL
    assert claims.left_over() == [] and not folder.exists() and not claims.ledger.exists()
    assert claims.release() == []


def test_what_was_never_made_is_no_trouble(claims, tmp_path):
    claims.note("folder", str(tmp_path / "never"))
    claims.note("mount", str(tmp_path / "never"))
    claims.note("cgroup", str(tmp_path / "never"))
    claims.note("namespace", claims.name("never"))
    assert claims.left_over() == []
    assert claims.release() == []


def test_a_process_of_the_same_id_but_another_birth_is_left_alone(claims):
    with sleeper() as process:
        claims.note("process", str(process.pid))
        text = claims.ledger.read_text()
        claims.ledger.write_text(text.replace(birth(process.pid), "12345"))
        assert claims.release() == []
        assert process.poll() is None


def test_what_cannot_be_undone_is_said_and_stays_in_the_ledger(claims, tmp_path, monkeypatch):
    """A claimed cgroup that is an ordinary folder with a file in it cannot be removed as a cgroup."""
    monkeypatch.setattr("p2pllm_peers.lab.cleanup.undo.PATIENCE_S", 0.1)
    (tmp_path / "not-a-group").mkdir()
    (tmp_path / "not-a-group" / "file").write_text("x")
    claims.note("cgroup", str(tmp_path / "not-a-group"))
    folder = make_folder(claims, tmp_path / "made")
    failed = claims.release()
    assert len(failed) == 1 and str(tmp_path / "not-a-group") in failed[0] and failed[0].endswith(".")
    assert not folder.exists()
    assert claims.left_over() == [f"cgroup {tmp_path / 'not-a-group'}"]
    (tmp_path / "not-a-group" / "file").unlink()
    assert claims.release() == [] and not claims.ledger.exists()


def test_names_carry_the_id_and_ids_differ(claims, tmp_path):
    with Claims.open(tmp_path / "ledgers") as other:
        assert claims.id != other.id
        assert claims.name("hub") == f"p2pllm-{claims.id}-hub"


def test_a_sweep_undoes_dead_labs_and_nothing_else(claims, tmp_path):
    kept = make_folder(claims, tmp_path / "kept")
    bystander = tmp_path / "bystander"
    bystander.mkdir()
    dead = Claims.open(tmp_path / "ledgers")
    gone = make_folder(dead, tmp_path / "gone")
    abandon(dead.ledger)
    with dead.ledger.open("a") as file:
        file.write('{"kind": "folder", "wha')  # it died while it wrote this
    assert sweep(tmp_path / "ledgers") == [f"folder {gone} of lab {dead.id}"]
    assert kept.exists() and bystander.exists() and claims.ledger.exists()
    assert not gone.exists() and not dead.ledger.exists()
    assert sweep(tmp_path / "ledgers") == []
    dead.release()


def test_a_ledger_that_is_gone_takes_no_claims(claims):
    claims.release()
    with pytest.raises(RunError, match="ledger"):
        claims.note("folder", "/nowhere")


def test_a_folder_that_cannot_hold_ledgers_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        Claims.open(tmp_path / "file" / "below")


@pytest.mark.swarm
@needs_root
def test_what_appears_while_its_lab_dies_is_removed_at_the_second_look(claims, monkeypatch):
    name = claims.note("namespace", claims.name("late"))

    def release_then_appear(ledger: Path) -> list[str]:
        failed = release(ledger)
        subprocess.run(["ip", "netns", "add", name], check=True)
        return failed

    monkeypatch.setattr("p2pllm_peers.lab.cleanup.claims.release", release_then_appear)
    monkeypatch.setattr("p2pllm_peers.lab.cleanup.claims.SECOND_LOOK_S", 0)
    release_after_death(claims.ledger)
    assert claims.left_over() == []


@pytest.mark.swarm
@needs_root
def test_a_mount_that_somebody_holds_goes_all_the_same(claims, tmp_path, monkeypatch):
    monkeypatch.setattr("p2pllm_peers.lab.cleanup.undo.PATIENCE_S", 0.1)
    folder = Path(claims.note("folder", str(tmp_path / "disk")))
    folder.mkdir()
    claims.note("mount", str(folder))
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
    with (folder / "file").open("w"):
        assert claims.release() == []
        assert claims.left_over() == []


OWNER = """
import subprocess, sys, time
from pathlib import Path
from p2pllm_peers.lab.cleanup.claims import Claims
claims = Claims.open(Path(sys.argv[1]))
folder = Path(sys.argv[2])
claims.note("folder", str(folder))
folder.mkdir()
prefix = []
if sys.argv[3:]:
    claims.note("namespace", claims.name("x"))
    subprocess.run(["ip", "netns", "add", claims.name("x")], check=True)
    prefix = ["ip", "netns", "exec", claims.name("x")]
child = subprocess.Popen([*prefix, "sleep", "600"])
claims.note("process", str(child.pid))
guard = claims._guard.pid
print(child.pid, guard, claims.id, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def owner(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, int, str]]:
    """A lab in a process of its own; its child, its guard and its id."""
    words = [sys.executable, "-c", OWNER, str(tmp_path / "ledgers"), str(tmp_path / "made"), *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            child, guard, name = process.stdout.readline().split()
            yield process, int(child), int(guard), name
        finally:
            process.kill()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_guard_undoes_what_a_killed_lab_made(tmp_path):
    with owner(tmp_path) as (process, child, guard, _):
        assert until(lambda: ignores(guard, signal.SIGTERM))  # it does not go before its lab
        os.kill(guard, signal.SIGTERM)
        os.kill(guard, signal.SIGINT)
        process.kill()
        assert until(lambda: not birth(child) and not birth(guard))
    assert not (tmp_path / "made").exists()
    assert list((tmp_path / "ledgers").iterdir()) == []


@pytest.mark.swarm
@needs_root
def test_the_guard_removes_namespaces_with_all_that_runs_in_them(tmp_path):
    with owner(tmp_path, "namespace") as (process, child, guard, name):
        assert (Path("/run/netns") / f"p2pllm-{name}-x").exists()
        process.kill()
        assert until(lambda: not birth(child) and not birth(guard))
    assert not (Path("/run/netns") / f"p2pllm-{name}-x").exists()


@pytest.mark.swarm
@needs_root
def test_a_sweep_comes_after_a_lab_that_was_killed_with_its_guard(tmp_path):
    """Beside it lives another lab, whose namespace and process stay."""
    with Claims.open(tmp_path / "ledgers") as other:
        mine = other.note("namespace", other.name("x"))
        subprocess.run(["ip", "netns", "add", mine], check=True)
        with (
            owner(tmp_path, "namespace") as (process, child, guard, name),
            sleeper("ip", "netns", "exec", mine) as bystander,
        ):
            os.kill(guard, signal.SIGKILL)
            process.kill()
            process.wait()
            assert birth(child)
            lines = sweep(tmp_path / "ledgers")
            assert f"namespace p2pllm-{name}-x of lab {name}" in lines
            assert not birth(child) and not (Path("/run/netns") / f"p2pllm-{name}-x").exists()
            assert bystander.poll() is None and (Path("/run/netns") / mine).exists()
        assert other.release() == []
        assert not (Path("/run/netns") / mine).exists()


@pytest.mark.swarm
@needs_root
def test_mounts_and_groups_are_undone_with_their_processes(claims, tmp_path):
    root = next((path for path in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")) if path.is_dir()), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no cgroups to write")
    group = Path(claims.note("cgroup", str(root / claims.name("group"))))
    (group / "inner").mkdir(parents=True)
    folder = Path(claims.note("folder", str(tmp_path / "disk")))
    folder.mkdir()
    claims.note("mount", str(folder))
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
    with sleeper() as process:
        (group / "inner" / "cgroup.procs").write_text(str(process.pid))
        assert claims.left_over() == [
            f"process {process.pid} in cgroup {group}",
            f"cgroup {group}",
            f"folder {folder}",
            f"mount {folder}",
        ]
        assert claims.release() == []
        assert process.wait(5) == -signal.SIGKILL
    assert not group.exists() and not folder.exists()


def test_birth_tells_the_living_from_the_dead():
    with sleeper() as process:
        born = birth(process.pid)
        assert alive(process.pid, born) and not alive(process.pid, "")
        process.kill()
        assert until(lambda: not alive(process.pid, born))  # dead before anybody waits for it
    assert birth(process.pid) == ""
