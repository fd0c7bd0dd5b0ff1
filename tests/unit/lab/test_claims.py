"""Ledgers: everything in them can be undone, by whoever, and nothing else is touched."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_processes import needs_root, sleeper, until

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.claims import Claims, sweep
from p2pllm_peers.lab.cleanup.undo import alive, birth, undo


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    with Claims.open(tmp_path / "ledgers") as made:
        yield made


def end_guard(claims: Claims) -> None:
    """From now on the lab has to do it itself."""
    claims._guard.kill()
    claims._guard.wait()


def mount(source: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", source, str(folder)], check=True)


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
    end_guard(claims)
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
    end_guard(dead)
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
def test_a_mount_that_somebody_holds_goes_all_the_same(claims, tmp_path, monkeypatch):
    end_guard(claims)
    monkeypatch.setattr("p2pllm_peers.lab.cleanup.undo.PATIENCE_S", 0.1)
    claims.note("folder", str(tmp_path / "disk"))
    mount(claims.note("mount", claims.name("disk")), tmp_path / "disk")
    with (tmp_path / "disk" / "file").open("w"):
        assert claims.release() == []
        assert claims.left_over() == []


@pytest.mark.swarm
@needs_root
def test_a_mount_is_found_wherever_its_folder_has_been_moved(claims, tmp_path):
    mount(claims.note("mount", claims.name("disk")), tmp_path / "out" / "disk")
    (tmp_path / "out").rename(tmp_path / "moved to")
    assert (tmp_path / "moved to" / "disk").is_mount()
    assert claims.release() == []
    assert not (tmp_path / "moved to" / "disk").is_mount() and claims.left_over() == []


@pytest.mark.swarm
@needs_root
def test_a_folder_with_a_mount_that_is_no_claim_stays(claims, tmp_path):
    folder = make_folder(claims, tmp_path / "with space")
    mount("none", folder / "disk")
    try:
        (folder / "disk" / "file").write_text("x")
        assert claims.release() == [
            f"The lab's folder {folder} could not be removed: {folder / 'disk'} is still mounted."
        ]
        assert (folder / "disk" / "file").exists()
    finally:
        subprocess.run(["umount", str(folder / "disk")], check=True)


def make_group(claims: Claims) -> Path:
    """A cgroup with another one in it."""
    root = next((path for path in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")) if path.is_dir()), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no cgroups to write")
    group = Path(claims.note("cgroup", str(root / claims.name("group"))))
    (group / "inner").mkdir(parents=True)
    return group


@pytest.mark.swarm
@needs_root
def test_mounts_and_groups_are_undone_with_their_processes(claims, tmp_path):
    group = make_group(claims)
    folder = Path(claims.note("folder", str(tmp_path / "disk")))
    mount(claims.note("mount", claims.name("disk")), folder)
    with sleeper() as process:
        (group / "inner" / "cgroup.procs").write_text(str(process.pid))
        assert claims.left_over() == [
            f"process {process.pid} in cgroup {group}",
            f"cgroup {group}",
            f"folder {folder}",
            f"mount {claims.name('disk')}",
        ]
        assert claims.release() == []
        assert process.wait(5) == -signal.SIGKILL
    assert not group.exists() and not folder.exists()


@pytest.mark.swarm
@needs_root
def test_a_process_that_comes_into_a_group_last_does_not_keep_it(claims, monkeypatch):
    """As one does that its lab had started a moment before it was killed."""
    group = make_group(claims)
    with sleeper() as process:

        def come_in(_: object) -> set[int]:
            (group / "inner" / "cgroup.procs").write_text(str(process.pid))
            return set()

        monkeypatch.setattr("p2pllm_peers.lab.cleanup.undo._end_processes", come_in)
        assert undo(claims._noted) == []
        assert process.wait(5) == -signal.SIGKILL
    assert not group.exists()


def test_birth_tells_the_living_from_the_dead():
    with sleeper() as process:
        born = birth(process.pid)
        assert alive(process.pid, born) and not alive(process.pid, "")
        process.kill()
        assert until(lambda: not alive(process.pid, born))  # dead before anybody waits for it
    assert birth(process.pid) == ""
