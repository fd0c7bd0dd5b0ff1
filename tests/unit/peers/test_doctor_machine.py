"""What the doctor finds of a run on a machine that takes part in it already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p2pllm.identity import Identity
from p2pllm.invite import Invite
from p2pllm.manifest import DataSection, RunDraft
from p2pllm.settings import PeerSettings
from p2pllm.training.data import Corpus
from p2pllm.training.tokenizer import load_tokenizer
from p2pllm_peers.doctor.machine import files_here, text_here
from p2pllm_peers.folders import VOLUNTEER, RunFolder

RUN = "5a" * 32


def test_the_files_of_the_peer_that_would_be_started_are_counted(tmp_path: Path) -> None:
    assert files_here(tmp_path, "") == files_here(tmp_path, RUN) == 0
    for name, size in ((VOLUNTEER, 70), ("another", 900)):
        folder = RunFolder(tmp_path, RUN).peer(name).path / "state"
        folder.mkdir(parents=True)
        (folder / "snapshot").write_bytes(bytes(size))
    assert files_here(tmp_path, RUN) == 70


def test_text_that_was_tokenised_before_is_counted(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("so it goes on and on. " * 200)
    (tmp_path / "text" / "two.txt").write_text("and on it goes. " * 200)
    draft = RunDraft(data=DataSection(source=f"text:{tmp_path}/text", context_length=16, validation_samples=2))
    settings, tokenizer = PeerSettings(home=tmp_path, cache=tmp_path / "cache"), load_tokenizer(None)
    assert text_here(draft, settings, tokenizer) == 0
    Corpus.open(draft.data, tokenizer, settings.cache)
    (tokens,) = settings.cache.glob("*.tokens")
    assert text_here(draft, settings, tokenizer) == tokens.stat().st_size > 0
    gone = settings.model_copy(update={"data_path": str(tmp_path / "nowhere")})
    assert text_here(draft, gone, tokenizer) == 0


async def test_a_port_for_bulk_that_a_peer_here_has_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2pllm_peers.doctor import outside  # loads hivemind

    asked: list[Any] = []

    async def start(*arguments: Any, **_: Any) -> None:
        asked.append(arguments[3])

    monkeypatch.setattr(outside.Node, "start", start)
    identity, invite = Identity.generate(), Invite(RUN, Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/1",))
    await outside._start(identity, invite, PeerSettings(home=tmp_path, direct_port=4002, listen_port=4001), tmp_path)
    assert [(settings.listen_port, settings.direct_port) for settings in asked] == [(4001, 0)]
