"""Folders: which peer of which run is meant, who lives, and what a failure leaves."""

import os
from pathlib import Path

import pytest

from p2pllm.errors import DaemonError, ManifestError, StateError
from p2pllm.identity import Identity
from p2pllm.manifest import RunDraft, RunManifest
from p2pllm_peers.folders import (
    FOUNDER,
    SIGNING_DOMAIN,
    VOLUNTEER,
    RunFolder,
    all_runs,
    check_signature,
    founded_from,
    key_file,
    name_to_join_as,
    write_whole,
)

DRAFT = RunDraft()


def sealed(identity: Identity, draft: RunDraft = DRAFT, tokenizer: str = "bytes") -> tuple[RunManifest, bytes]:
    manifest = draft.seal(founder=identity.peer_id, initial_state="5a" * 32, tokenizer=tokenizer, data_digest="")
    return manifest, identity.sign(SIGNING_DOMAIN, manifest.canonical_bytes())


def saved(home: Path, identity: Identity, draft: RunDraft = DRAFT) -> RunFolder:
    manifest, signature = sealed(identity, draft)
    run = RunFolder(home, manifest.run_id)
    run.save(manifest, signature, None, draft.digest())
    return run


@pytest.fixture
def identity() -> Identity:
    return Identity.generate()


def test_a_run_comes_back_as_it_was_saved(tmp_path: Path, identity: Identity) -> None:
    manifest, signature = sealed(identity, tokenizer=f"blake3:{'ab' * 32}")
    run = RunFolder(tmp_path, manifest.run_id)
    assert run.load() is None
    run.save(manifest, signature, b"{}")
    assert run.load() == (manifest, signature, b"{}")
    assert sorted(path.name for path in run.path.iterdir()) == ["manifest.json", "manifest.sig", "tokenizer.json"]


def test_a_manifest_of_somebody_else_is_refused(tmp_path: Path, identity: Identity) -> None:
    manifest, signature = sealed(identity)
    check_signature(manifest, signature)
    other = Identity.generate()
    for wrong in (b"", bytes(64), other.sign(SIGNING_DOMAIN, manifest.canonical_bytes())):
        with pytest.raises(ManifestError, match="not signed by its founder"):
            check_signature(manifest, wrong)
    with pytest.raises(ManifestError, match="not signed"):  # signed by the right key, for another purpose
        check_signature(manifest, identity.sign("vote", manifest.canonical_bytes()))
    run = RunFolder(tmp_path, manifest.run_id)
    run.save(manifest, bytes(64), None)
    with pytest.raises(ManifestError, match="not signed"):
        run.load()


def test_a_damaged_manifest_is_refused_but_still_listed(tmp_path: Path, identity: Identity) -> None:
    run = saved(tmp_path, identity)
    (run.path / "manifest.json").write_bytes(b"{}")
    with pytest.raises(ManifestError):
        run.load()
    (listed,) = all_runs(tmp_path)
    assert listed.path == run.path
    with pytest.raises(ManifestError):
        listed.load()


def test_a_missing_file_of_a_run_is_one_sentence(tmp_path: Path, identity: Identity) -> None:
    run = saved(tmp_path, identity)
    (run.path / "manifest.sig").unlink()
    with pytest.raises(StateError, match=r"manifest\.sig: No such file"):
        run.load()


def test_runs_are_listed_with_the_one_used_last_first(tmp_path: Path, identity: Identity) -> None:
    assert all_runs(tmp_path) == []
    runs = [saved(tmp_path, identity, DRAFT.model_copy(update={"seed": seed})) for seed in range(3)]
    for age, run in enumerate(runs):
        os.utime(run.path, (1000 - age, 1000 - age))
    assert all_runs(tmp_path) == runs
    trained = runs[2].peer(VOLUNTEER)
    trained.path.mkdir()
    (trained.path / "rounds.jsonl").write_text("")
    os.utime(runs[2].path, (0, 0))
    assert all_runs(tmp_path)[0] == runs[2], "its folder is old, but a peer of it has trained just now"


def test_running(tmp_path: Path) -> None:
    peer = RunFolder(tmp_path, "ab" * 32).peer("x")
    assert peer.running() is None
    handle = peer.lock()
    assert peer.running() == {}, "it is starting"
    (peer.path / "daemon.json").write_text('{"pid": 7}')
    assert peer.running() == {"pid": 7}
    (peer.path / "daemon.json").write_text('{"pi')
    assert peer.running() == {}, "it is being written"
    os.close(handle)
    assert peer.running() is None, "what a killed daemon left says nothing"
    assert peer.run.peers() == [peer]


def test_one_daemon_a_peer(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "ab" * 32)
    handle = run.peer("x").lock()
    with pytest.raises(DaemonError, match=r"already takes part in run abababababababab as 'x'.*status.*--name"):
        run.peer("x").lock()
    os.close(run.peer("y").lock())
    os.close(handle)
    os.close(run.peer("x").lock())


def test_a_look_at_a_peer_does_not_keep_its_daemon_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import time

    peer = RunFolder(tmp_path, "ab" * 32).peer("x")
    os.close(peer.lock())
    looking = os.open(peer.path / "daemon.lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
    os.close(peer.lock())
    os.close(looking)


def test_name_to_join_as(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "ab" * 32)
    assert name_to_join_as(run) == VOLUNTEER, "a machine that is new to the run"
    handle = run.peer(FOUNDER).lock()
    assert name_to_join_as(run) == VOLUNTEER, "a second terminal beside the founder"
    os.close(handle)
    assert name_to_join_as(run) == FOUNDER, "the founder comes back"
    os.close(run.peer(VOLUNTEER).lock())
    assert name_to_join_as(run) == VOLUNTEER, "the volunteer comes back"


def test_founded_from_the_same_draft_by_the_same_key(tmp_path: Path, identity: Identity) -> None:
    run = saved(tmp_path, identity)
    assert founded_from(tmp_path, DRAFT.digest(), identity.peer_id) == run
    assert founded_from(tmp_path, DRAFT.digest(), Identity.generate().peer_id) is None
    assert founded_from(tmp_path, "ab" * 32, identity.peer_id) is None
    (run.path / "draft.digest").unlink()
    assert founded_from(tmp_path, DRAFT.digest(), identity.peer_id) is None, "a run that was joined"


def test_a_run_that_was_never_entered_is_discarded(tmp_path: Path, identity: Identity) -> None:
    run = RunFolder(tmp_path, "ab" * 32)
    run.discard_unsaved()
    os.close(run.peer("x").lock())
    handle = run.peer("y").lock()
    run.discard_unsaved()
    assert run.peer("x").path.exists(), "a daemon is on its way into this run"
    os.close(handle)
    run.discard_unsaved()
    assert not run.path.exists() and (tmp_path / "runs").is_dir()
    whole = saved(tmp_path, identity)
    whole.discard_unsaved()
    assert whole.load() is not None


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, identity: Identity) -> None:
    manifest, signature = sealed(identity)
    run = RunFolder(tmp_path, manifest.run_id)
    (run.path / f".draft.digest.{os.getpid()}.tmp").mkdir(parents=True)  # a disk that takes the first file only
    with pytest.raises(StateError, match=r"Cannot use .*draft\.digest.*--home"):
        run.save(manifest, signature, None, DRAFT.digest())
    assert not run.path.exists()


def test_write_whole_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600, "a daemon's has the invite"
    (tmp_path / f".file.{os.getpid()}.tmp").mkdir()
    with pytest.raises(StateError, match="Cannot use"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_home_inside_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"file.*Not a directory; .*--home"):
        RunFolder(tmp_path / "file", "ab" * 32).peer("x").lock()


def test_keys_belong_to_names(tmp_path: Path) -> None:
    assert RunFolder(tmp_path, "ab" * 32).peer("x").key == RunFolder(tmp_path, "cd" * 32).peer("x").key
    assert key_file(tmp_path, "x") == tmp_path / "keys" / "x.key"
