"""The benchmark of systems: baselines take the steps that p2pllm takes, and figures follow from records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from p2pllm.manifest import RunDraft
from p2pllm.state import AdamW, SharedState
from p2pllm.training.model import build, layout_of, read_params, trained_parameters
from p2pllm.training.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).parents[3] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))

from baselines.figures import Round, figures, rounds_of, seconds_to  # noqa: E402 - where these lie is said above
from baselines.messages import Order, Row  # noqa: E402
from baselines.peer import ClippedAdamW, groups, schedule  # noqa: E402

DRAFT = RunDraft.model_validate(
    {
        "model": {"config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}},
        "data": {"context_length": 32, "validation_samples": 4, "validation_every": 2},
        "optimizer": {"warmup_rounds": 2, "clip_norm": 0.5},
        "round": {"rounds": 6, "samples": 12},
    }
)  # fmt: skip


def test_the_baselines_optimizer_takes_the_steps_of_ours() -> None:
    model = build(DRAFT, load_tokenizer(None))
    layout = layout_of(model)
    params = np.empty(layout.size, np.float32)
    read_params(model, params)
    state = SharedState.initial(layout, params)
    ours = AdamW(DRAFT.optimizer, DRAFT.round.rounds, layout)
    theirs = ClippedAdamW(groups(model), DRAFT.optimizer)
    scheduler = schedule(theirs, DRAFT)
    random = np.random.default_rng(0)
    for _ in range(DRAFT.round.rounds):
        gradient = random.normal(size=layout.size).astype(np.float32)  # of a norm that is clipped
        for (_, parameter), view in zip(trained_parameters(model), layout.views(gradient.copy()).values(), strict=True):
            parameter.grad = torch.from_numpy(view.copy())
        theirs.step()
        scheduler.step()
        ours.step(state, gradient)
    trained = np.empty(layout.size, np.float32)
    read_params(model, trained)
    assert np.linalg.norm(trained - state.params) <= 1e-5 * np.linalg.norm(state.params)


def test_a_baseline_trains_records_and_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{number} little words about machines\n" for number in range(2000)))
    draft = DRAFT.model_copy(update={"data": DRAFT.data.model_copy(update={"source": f"text:{tmp_path}/text.txt"})})
    rows = tmp_path / "rows.jsonl"
    order = Order(draft.model_dump(mode="json"), 0, 1, "127.0.0.1", str(tmp_path / "cache"), 4, str(rows), {})
    process = subprocess.Popen(
        [sys.executable, "-m", "baselines.solo"],
        cwd=SCRIPTS,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        print(json.dumps(asdict(order)), file=process.stdin, flush=True)
        assert json.loads(process.stdout.readline()) == {"event": "ready"}
        print(json.dumps({"go": 100}), file=process.stdin, flush=True)
        while not rows.exists() or len(rows.read_text().splitlines()) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        process.stdin.close()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["round"] for row in found] == list(range(1, len(found) + 1))
    assert {row["tokens"] for row in found} == {12 * 32}
    assert [row["validation_loss"] is not None for row in found[:4]] == [True, True, False, True]
    assert found[3]["validation_loss"] < found[0]["validation_loss"]


def test_rounds_are_what_all_peers_together_did() -> None:
    rows = {
        "a": [Row(10.0, 1, 100, 5.0, 4.0), Row(20.0, 2, 100, 3.0, None)],
        "b": [Row(11.0, 1, 300, 1.0, 2.0)],
    }
    assert rounds_of(rows) == [Round(1, 10.0, 400, 2.0, 3.0), Round(2, 20.0, 100, 3.0, None)]


def test_figures_leave_out_the_start_and_the_cut_off_round() -> None:
    rounds = [Round(1, 110.0, 999, 5.0, 5.0), Round(2, 120.0, 400, 4.0), Round(3, 130.0, 600, 3.0, 3.0)]
    wire = [(100.0, 0), (105.0, 500), (115.0, 1500), (140.0, 4000)]
    found = figures(rounds, 100.0, wire, 4.0)
    assert found.tokens_per_s == pytest.approx(1000 / 20)
    assert found.bytes_per_token == pytest.approx((3000 - 1000) / 1000)
    assert found.seconds_to_loss == pytest.approx(20.0)
    assert found.best_loss == 3.0


def test_nothing_is_made_up_where_too_little_was_recorded() -> None:
    nothing, one = figures([], 0.0, [], 3.0), figures([Round(1, 5.0, 100, 5.0, 5.0)], 0.0, [(4.0, 1), (6.0, 2)], 3.0)
    assert (nothing.tokens_per_s, nothing.bytes_per_token, nothing.best_loss) == (None, None, None)
    assert (one.tokens_per_s, one.bytes_per_token, one.seconds_to_loss, one.best_loss) == (None, None, None, 5.0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([], None), ([(3.0, 1.0)], 3.0), ([(1.0, 5.0), (2.0, 4.0)], None), ([(1.0, 5.0), (3.0, 1.0)], 2.5)],
)
def test_seconds_to_a_loss(losses: list[tuple[float, float]], expected: float | None) -> None:
    assert seconds_to(losses, 2.0) == expected
