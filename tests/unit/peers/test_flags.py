"""Flags stay with a peer: a bare start takes them again, a new one or a changed setting takes their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from p2pllm.errors import SettingsError
from p2pllm.settings import load_settings
from p2pllm.settings_file import change_settings
from p2pllm_cli.guest import set_
from p2pllm_cli.peer import _kept as flags_to_keep
from p2pllm_peers.flags import FILE, Wishes, forget, keep, kept
from p2pllm_peers.folders import PeerFolder, RunFolder


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerFolder:
    for name in [name for name in os.environ if name.startswith("P2PLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("P2PLLM_CONFIG", str(tmp_path))
    found = RunFolder(tmp_path, "ab" * 32).peer("volunteer")
    found.path.mkdir(parents=True)
    return found


def start(peer: PeerFolder, **flags: object) -> Wishes:
    return Wishes(load_settings(home=peer.run.home, **flags), flags)


def test_a_bare_start_is_like_the_one_before(peer: PeerFolder) -> None:
    change_settings({"upload_mbit": "1", "threads": "2"})
    given = start(peer, upload_mbit=9.0, nat=False, announce=("/ip4/192.0.2.1/tcp/1",), device="cuda:1").begin(peer)
    bare = start(peer).begin(peer)
    assert bare == given
    assert (bare.upload_mbit, bare.nat, bare.device, bare.threads) == (9.0, False, "cuda:1", 2)
    anew = start(peer, upload_mbit=0.0).begin(peer)
    assert (anew.upload_mbit, anew.device) == (0.0, "cuda:1")
    assert start(peer).begin(peer) == anew


def test_a_flag_of_another_time_is_a_sentence_and_a_damaged_file_none(peer: PeerFolder) -> None:
    keep(peer, {"device": "tpu"})
    with pytest.raises(SettingsError, match="device"):
        start(peer).begin(peer)
    (peer.path / FILE).write_text('{"gone": 1, "home": "/elsewhere", "threads": 3}')
    assert kept(peer) == {"threads": 3}
    for content in ("[", "[]", "3"):
        (peer.path / FILE).write_text(content)
        assert kept(peer) == {}


def test_what_is_changed_while_a_peer_starts_is_news(peer: PeerFolder) -> None:
    wishes = start(peer, upload_mbit=9.0, disk_gb=3.0)
    wishes.begin(peer)
    assert wishes.news(peer) == {}
    change_settings({"cpu_percent": "40", "threads": "1", "disk_gb": "4"})
    assert wishes.news(peer) == {"cpu_percent": 40.0}, "threads wait for a start, and flags are stronger"
    change_settings({"upload_mbit": "0"})
    assert forget(peer, {"upload_mbit", "cpu_percent"}) == {"upload_mbit": 9.0}
    assert wishes.news(peer) == {"cpu_percent": 40.0, "upload_mbit": 0.0}
    final = Wishes(load_settings(home=peer.run.home, threads=7, nice=3), None)
    assert final.begin(peer).threads == 7 and final.news(peer) == {}
    (peer.run.home / "settings.toml").write_text("= =")
    assert wishes.news(peer) == {}


def test_flags_are_shown_with_the_settings(peer: PeerFolder) -> None:
    os.close(peer.lock())
    (peer.run.path / "manifest.json").write_text("{}")
    keep(peer, {"device": "cuda:1", "upload_mbit": 9.0})
    shown = CliRunner().invoke(set_, ["--home", str(peer.run.home)]).output
    assert f"home = {peer.run.home}\n" in shown
    assert "'volunteer' in run abababababababab was started with device = cuda:1, upload_mbit = 9.0, and" in shown


def test_a_text_is_found_from_every_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"data_path": "text", "home": tmp_path, "threads": 0, "nat": None, "announce": (), "disk_gb": 2.0}
    assert flags_to_keep(flags) == {"data_path": str(tmp_path / "text"), "threads": 0, "disk_gb": 2.0}
    assert flags_to_keep({"data_path": ""}) == {"data_path": ""}
