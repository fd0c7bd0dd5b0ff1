"""Housekeeping: what may go, and what never does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from p2pllm.errors import DaemonError, OccupiedError, StateError
from p2pllm.identity import Identity
from p2pllm.manifest import RunDraft
from p2pllm.sections import DataSection
from p2pllm.training.data import Corpus
from p2pllm.training.tokenizer import ByteTokenizer
from p2pllm_peers.folders import SIGNING_DOMAIN, PeerFolder, RunFolder
from p2pllm_peers.housekeeping import last_round, needless, remove, remove_run, run_name, size_of, whole_run
from p2pllm_peers.service import Answer, Systemd


@pytest.fixture
def peer(tmp_path: Path) -> PeerFolder:
    """One that has taken part in a run, up to round 7."""
    identity = Identity.generate()
    manifest = RunDraft(name="mine").seal(
        founder=identity.peer_id, initial_state="5a" * 32, tokenizer="bytes", data_digest=""
    )
    run = RunFolder(tmp_path / "home", manifest.run_id)
    run.save(manifest, identity.sign(SIGNING_DOMAIN, manifest.canonical_bytes()), None)
    peer = run.peer("volunteer")
    os.close(peer.lock())
    (peer.path / "rounds.jsonl").write_text("".join(json.dumps({"round": round_}) + "\n" for round_ in range(1, 8)))
    (peer.path / "state").mkdir()
    (peer.path / "state" / "snapshot").write_bytes(bytes(5000))
    return peer


def test_what_is_known_of_a_run(peer: PeerFolder):
    assert run_name(peer.run) == "mine" and last_round(peer) == 7
    assert 5000 < size_of(peer.path) < size_of(peer.run.path) < 10_000
    away = (peer.path / "rounds.jsonl").rename(peer.path / "rounds.jsonl.1")
    assert last_round(peer) == 7, "it was put away just now"
    away.unlink()
    (peer.path / "rounds.jsonl").write_bytes(b"not json\n")
    (peer.run.path / "manifest.json").write_bytes(b"{")
    assert run_name(peer.run) == "" and last_round(peer) is None


def test_a_run_goes_as_a_whole_but_its_key_stays(peer: PeerFolder):
    peer.key.parent.mkdir(parents=True)
    peer.key.write_bytes(b"key")
    held = whole_run(peer.run)
    assert "mine" in held.what and "round 7" in held.what and held.size == size_of(peer.run.path)
    remove_run(peer.run)
    assert not peer.run.path.exists() and peer.key.exists()


def test_a_peer_that_started_while_the_user_was_asked_is_not_touched(peer: PeerFolder):
    whole_run(peer.run)
    lock = peer.lock()
    with pytest.raises(OccupiedError):
        remove_run(peer.run)
    assert (peer.path / "state" / "snapshot").exists()
    os.close(lock)


def test_none_starts_while_its_run_is_deleted(peer: PeerFolder, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path: seen.append(peer.running()))
    remove_run(peer.run)
    assert seen == [{}] and peer.running() is None


def test_a_run_with_a_service_stays(peer: PeerFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("p2pllm_peers.housekeeping.manager", lambda: Systemd(lambda arguments: Answer(0, "")))
    Systemd(lambda arguments: Answer(0, "")).install(peer)
    with pytest.raises(DaemonError, match=r"service remove --run \w{16} --name volunteer` first"):
        whole_run(peer.run)
    whole_run(RunFolder(tmp_path / "elsewhere", peer.run.run_id))


def test_text_that_a_peer_of_another_home_reads_stays(tmp_path: Path):
    (tmp_path / "text").write_text("some words to train on\n" * 200)
    section = DataSection(source=f"text:{tmp_path / 'text'}", context_length=8)
    corpus = Corpus.open(section, ByteTokenizer(), tmp_path / "cache")
    assert needless(tmp_path / "home", tmp_path / "cache") == []
    del corpus
    (held,) = needless(tmp_path / "home", tmp_path / "cache")
    again = Corpus.open(section, ByteTokenizer(), tmp_path / "cache")
    with pytest.raises(StateError, match="reads it"):
        remove(held)
    del again
    remove(held)
    assert not list((tmp_path / "cache").glob("*.tokens"))


def test_nothing_of_a_peer_that_runs_is_touched(peer: PeerFolder, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "ab.tokens").write_bytes(bytes(300))
    lock = peer.lock()
    try:
        with pytest.raises(DaemonError, match="leave"):
            whole_run(peer.run)
        assert needless(peer.run.home, cache) == []
    finally:
        os.close(lock)
    (held,) = needless(peer.run.home, cache)
    assert held.size == 300


def test_tokenised_text_goes_with_its_index(tmp_path: Path):
    for name in ("ab.tokens", "ab.json", "cd.tokens", "other.txt"):
        (tmp_path / name).write_bytes(b"x")
    for held in needless(tmp_path / "home", tmp_path):
        remove(held)
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.txt"]


def test_what_cannot_be_deleted_is_said(peer: PeerFolder, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(StateError, match="cannot be deleted: Permission denied"):
        remove_run(peer.run)
