"""A swarm computes what one process would: `sync` with three peers against the same micro-batches in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from p2pllm.manifest import RunDraft
from p2pllm.rounds.disk import Disk
from p2pllm.settings import PeerSettings
from p2pllm.state import AdamW, SharedState
from p2pllm.training.data import Corpus
from p2pllm.training.inner import GradientAccumulator
from p2pllm.training.model import build, layout_of, read_params, write_params
from p2pllm.training.tokenizer import load_tokenizer
from p2pllm_peers.folders import RunFolder
from p2pllm_peers.lab.swarm import swarm_on_loopback

ROUNDS = 20
LARGEST_DISTANCE = 1e-5
"""Relative L2 distance of the parameters after the last round: rounding of float32 sums in another order."""

DRAFT = RunDraft.model_validate(
    {
        "name": "fidelity",
        "model": {"config": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}},
        "data": {"context_length": 64, "validation_samples": 8, "validation_every": 10},
        "optimizer": {"warmup_rounds": 3},
        "round": {"rounds": ROUNDS, "samples": 48, "min_peers": 3},
    }
)  # fmt: skip


@pytest.mark.swarm
@pytest.mark.timeout(300)
def test_three_peers_equal_one_process(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    settings = PeerSettings(cache=tmp_path / "cache", micro_batch=4, threads=1)
    with swarm_on_loopback(DRAFT, 3, tmp_path / "out", settings) as swarm:
        swarm.start(list(swarm.peers), progress=lambda text: None)
        for peer in swarm.peers.values():
            peer.wait_end()
        records = {peer.ready["peer_id"]: peer.records() for peer in swarm.peers.values()}
        founder = next(iter(swarm.peers.values()))
        run_id = founder.ready["run_id"]

    members = [len(row["members"]) for row in records[founder.ready["peer_id"]]]
    assert members.count(3) >= ROUNDS - 2, f"the three peers hardly trained together: {members}"
    for number in range(1, ROUNDS + 1):
        rows = [row for peer in records.values() for row in peer if row["round"] == number]
        assert rows, f"nobody has a record of round {number}"
        assert len({row["state_digest"] for row in rows}) == 1, f"states differ after round {number}"
        assert len(rows) >= len(rows[0]["members"]), "a member of the round kept no record of it"

    loaded = RunFolder(founder.machine.home, run_id).load()
    assert loaded is not None
    manifest = loaded[0]
    alone = one_process(manifest, records, run_id, tmp_path / "cache")
    assert founder.folder is not None
    disk = Disk(founder.folder.path, manifest, alone.layout, read_only=True)
    trained = disk.recover(AdamW(manifest.optimizer, ROUNDS, alone.layout), None)
    assert trained is not None
    assert trained.round == ROUNDS
    distance = np.linalg.norm(trained.params.astype(np.float64) - alone.params) / np.linalg.norm(alone.params)
    record_property("relative L2 distance", float(distance))
    assert distance <= LARGEST_DISTANCE


def one_process(manifest: RunDraft, records: dict[str, list[dict]], run_id: str, cache: Path) -> SharedState:
    """Train alone on the micro-batches that the swarm's records name, all summed before each step."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(None)
    model = build(manifest, tokenizer)
    layout = layout_of(model)
    params = np.empty(layout.size, np.float32)
    read_params(model, params)
    state = SharedState.initial(layout, params)
    optimizer = AdamW(manifest.optimizer, manifest.round.rounds, layout)
    corpus = Corpus.open(manifest.data, tokenizer, cache)
    by_round = {peer: {row["round"]: row for row in rows} for peer, rows in records.items()}
    for number in range(1, manifest.round.rounds + 1):
        committed = next(rows[number] for rows in by_round.values() if number in rows)
        total, samples = np.zeros(layout.size, np.float64), 0
        write_params(model, state.params)
        for peer, weight in committed["members"].items():
            accumulator = GradientAccumulator(
                model, corpus, torch.device("cpu"), run_id=run_id, peer=peer, micro_batch=4
            )
            steps = by_round[peer][number]["own_steps"]
            assert sum(steps) == weight
            for step, count in enumerate(steps):
                accumulator.step(number - 1, step, count)
            mean = np.empty(layout.size, np.float32)
            total += accumulator.finish(mean) * mean.astype(np.float64)
            samples += weight
        optimizer.step(state, (total / samples).astype(np.float32))
    return state
