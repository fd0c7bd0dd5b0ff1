"""What the strategies learn from the same tokens: validation loss of each, against one process and against each other.

    .venv/bin/python scripts/bench/losses.py [--search] [--seeds 1 2 3] [--only NAME ...] [--rounds 10] [--warmup 90]

Several peers train in turn in one process, with the real inner work, compression, aggregation and outer step, and
nothing between them: losses depend on no clock and no line, so they can be had without a network. A row is one way to
train, a column one seed; each way sees as many tokens. Two at a time, with one thread each. `--search` shows
what the hyperparameters were chosen from, by default with a seed that the table does not have.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _table import table
from blake3 import blake3

from p2pllm.averaging.codecs import codec
from p2pllm.averaging.feedback import ErrorBuffer
from p2pllm.averaging.mean import weighted_mean
from p2pllm.averaging.sparse import SparseCodec
from p2pllm.averaging.sparse_mean import sparse_mean
from p2pllm.manifest import RunDraft
from p2pllm.settings import load_settings
from p2pllm.state import Layout, SharedState, moments_of, outer_optimizer
from p2pllm.training.data import Corpus
from p2pllm.training.evaluate import validation_loss
from p2pllm.training.model import build, layout_of, read_params
from p2pllm.training.tokenizer import load_tokenizer
from p2pllm.training.work import Local

CPU = torch.device("cpu")

Vector = np.ndarray
Exchange = Callable[[list[Vector], list[int]], Vector]


STEPS = 30
"""Between two averagings of the same parameters: H of the papers."""


@dataclass(frozen=True)
class Way:
    """One way to train."""

    strategy: str
    peers: int = 4
    steps: int = STEPS  # a peer and round
    overlap: bool = False
    fragments: int = 1
    codec: str = "fp32"
    divide_by: str = "senders"
    keep: int = 64
    decay: float = 0.95
    changes: dict[str, Any] = field(default_factory=dict)  # of the run file's sections

    def draft(self, seed: int, rounds: int, batch: int, warmup_steps: int) -> RunDraft:
        """The run file."""
        section = {"strategy": self.strategy, "rounds": rounds, "samples": self.peers * self.steps * batch}
        section |= {"overlap": self.overlap, "fragments": self.fragments}
        values: dict[str, Any] = {"seed": seed, "round": section}
        warmup = max(1, warmup_steps // self.steps)
        optimizer = {"batch": batch, "warmup_rounds": warmup, "learning_rate": RATE}
        values["optimizer"] = optimizer | self.changes.get("optimizer", {})
        values["outer"] = self.changes.get("outer", {})
        values["data"] = {"validation_samples": 256}
        return RunDraft.model_validate(values)


RATE = 2e-3
WARMUP_STEPS = 90
BATCH = 8
AHEAD = 6  # with overlap, one of so many steps of a round is computed while the update before travels
PLAIN = {"outer": {"learning_rate": 1.0, "momentum": 0.0}}
MUON = {"optimizer": {"type": "muon", "learning_rate": 16e-3}}
TUNED = Way("sparse_loco", decay=0.7, changes={"outer": {"learning_rate": 2.1}})
ALONE = Way("diloco", peers=1, changes=PLAIN)

WAYS: dict[str, Way] = {
    "one process, batch of all": ALONE,
    "one process, batch of one": ALONE,
    "diloco fp32": Way("diloco", changes=PLAIN),
    "diloco fp32, outer momentum": Way("diloco"),
    "diloco int8": Way("diloco", codec="int8", changes=PLAIN),
    "diloco fp32, overlap": Way("diloco", overlap=True, changes=PLAIN),
    "diloco fp32, 3 fragments": Way("diloco", steps=STEPS // 3, overlap=True, fragments=3, changes=PLAIN),
    "sparse_loco": TUNED,
    "sparse_loco, as its paper": Way("sparse_loco"),
    "sparse_loco, by all": replace(TUNED, divide_by="all"),
    "sparse_loco, overlap": replace(TUNED, overlap=True),
    "one process, muon": replace(ALONE, changes={**PLAIN, **MUON}),
    "diloco fp32, muon": Way("diloco", changes={**PLAIN, **MUON}),
    "diloco int8, muon, overlap": Way("diloco", overlap=True, codec="int8", changes={**PLAIN, **MUON}),
    "diloco fp32, muon, H 10": Way("diloco", steps=10, changes={**PLAIN, **MUON}),
    "sparse_loco, muon": Way("sparse_loco", changes={"optimizer": {"type": "muon"}}),
    **{f"diloco fp32, H {steps}": Way("diloco", steps=steps, changes=PLAIN) for steps in (10, 5)},
    **{f"sparse_loco, H {steps}": replace(TUNED, steps=steps) for steps in (10, 5)},
}


def _with(
    strategy: str, rate: float, outer: dict[str, float] | None = None, inner: str = "adamw", **fields: Any
) -> Way:
    """A strategy with this inner optimizer and learning rate, and these outer ones."""
    optimizer = {"type": inner, "learning_rate": rate}
    return Way(strategy, changes={"optimizer": optimizer, "outer": outer or {}}, **fields)


SEARCH: dict[str, Way] = {
    **{
        f"one process, rate {rate}": replace(ALONE, changes={**ALONE.changes, "optimizer": {"learning_rate": rate}})
        for rate in (1e-3, 2e-3, 4e-3)
    },
    **{
        f"diloco, rate {rate}, outer {outer} momentum {momentum}": _with(
            "diloco", rate, {"learning_rate": outer, "momentum": momentum}
        )
        for rate, outer, momentum in (
            (2e-3, 0.7, 0.9),
            (2e-3, 0.9, 0.6),
            (2e-3, 1.0, 0.0),
            (2e-3, 1.5, 0.0),
            (4e-3, 1.0, 0.0),
        )
    },
    **{f"sparse_loco, rate {rate}": _with("sparse_loco", rate) for rate in (1e-3, 2e-3, 4e-3)},
    **{
        f"sparse_loco, rate 0.002, outer {outer}": _with("sparse_loco", 2e-3, {"learning_rate": outer})
        for outer in (0.7, 1.3, 1.7)
    },
    **{
        f"one process, muon, rate {rate}": replace(
            ALONE, changes={**PLAIN, "optimizer": {"type": "muon", "learning_rate": rate}}
        )
        for rate in (4e-3, 8e-3, 16e-3, 32e-3)
    },
    **{
        f"diloco, muon, rate {rate}": _with("diloco", rate, PLAIN["outer"], inner="muon")
        for rate in (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
    },
    **{
        f"diloco, muon, rate 0.016, outer {outer} momentum {momentum}": _with(
            "diloco", 16e-3, {"learning_rate": outer, "momentum": momentum}, inner="muon"
        )
        for outer, momentum in ((0.7, 0.9), (0.9, 0.6))
    },
    **{
        f"sparse_loco, muon, rate {rate}": _with("sparse_loco", rate, inner="muon")
        for rate in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
    },
    **{
        f"sparse_loco, rate 0.002, error decay {decay}": _with("sparse_loco", 2e-3, decay=decay)
        for decay in (0.8, 0.9, 0.99)
    },
    **{
        f"sparse_loco, rate {rate}, outer {outer}, error decay {decay}": _with(
            "sparse_loco", rate, {"learning_rate": outer}, decay=decay
        )
        for rate, outer, decay in (
            (2e-3, 1.3, 0.5),
            (2e-3, 1.3, 0.7),
            (2e-3, 1.3, 0.8),
            (2e-3, 1.7, 0.8),
            (2e-3, 2.1, 0.8),
            (2e-3, 2.1, 0.7),
            (2.6e-3, 2.1, 0.8),
            (1.4e-3, 1.3, 0.8),
            (1.4e-3, 1.3, 0.95),
        )
    },
    "sparse_loco, rate 0.002, by all": _with("sparse_loco", 2e-3, divide_by="all"),
}
SEARCH_SEED = 11


def dense(way: Way) -> Exchange:
    """The mean as the all-reduce makes it, with the codec both ways."""
    chosen = codec(way.codec)

    def exchange(updates: list[Vector], samples: list[int]) -> Vector:
        terms = [_through(chosen, update) for update in updates]
        shares = [np.float32(count / sum(samples)) for count in samples]
        mean = np.empty_like(terms[0])
        weighted_mean(terms, shares, mean)
        return _through(chosen, mean)

    return exchange


def _through(chosen: Any, values: Vector) -> Vector:
    out = np.empty_like(values)
    chosen.decode(bytes(chosen.encode(values)), out)
    return out


def sparse(way: Way, layout: Layout) -> Exchange:
    """Every peer's compressed update, with its error feedback, and the mean of what was sent."""
    packer = SparseCodec(layout, way.keep)
    buffers = [ErrorBuffer(packer, "", way.decay) for _ in range(way.peers)]

    def exchange(updates: list[Vector], samples: list[int]) -> Vector:
        sent = [packer.decode(buffer.compress(update)) for buffer, update in zip(buffers, updates, strict=True)]
        for buffer in buffers:
            buffer.commit()
        return sparse_mean(sent, samples, layout.size, divide_by=way.divide_by)  # type: ignore[arg-type]

    return exchange


def train(name: str, seed: int, rounds: int, warmup_steps: int = WARMUP_STEPS) -> list[float]:
    """Validation loss after every fourth of a run, nats a token."""
    torch.set_num_threads(1)
    way = {**WAYS, **SEARCH}[name]
    alone = way.peers == 1
    steps = way.steps * (4 if name.endswith("batch of one") else 1)
    rounds = rounds * STEPS // way.steps
    batch = BATCH * (4 if alone and not name.endswith("batch of one") else 1)
    draft = way.draft(seed, rounds, batch, warmup_steps)
    tokenizer = load_tokenizer(None)
    models = [build(draft, tokenizer) for _ in range(way.peers)]
    layout = layout_of(models[0]).with_moments(moments_of(draft))
    corpus = Corpus.open(draft.data, tokenizer, load_settings().cache)
    works = [Local(draft, model, corpus, CPU, min(batch, 8)) for model in models]
    run = blake3(f"{seed}".encode()).hexdigest()
    for peer, work in enumerate(works):
        work.draw_for(run, str(peer))
    params = np.empty(layout.size, np.float32)
    read_params(models[0], params)
    state = SharedState.initial(layout, params)
    optimizer = outer_optimizer(draft, layout)
    exchange = sparse(way, layout) if draft.round.strategy == "sparse_loco" else dense(way)
    losses = []
    for round_ in range(rounds):
        updates, samples = [], []
        for work in works:
            update = np.empty(layout.size, np.float32)
            ahead = steps // AHEAD if way.overlap else 0
            if ahead and round_:
                work.land(state.params, round_)
            else:
                work.begin(state.params, round_)
            for step in range(ahead if round_ else 0, steps):
                work.step(round_, step)
            elements, count = work.finish(update)
            samples.append(count)
            updates.append(update[:elements])
            if ahead:
                work.go_on(round_ + 1)
            for step in range(ahead):
                work.step(round_ + 1, step)
        mean = updates[0] if alone else exchange(updates, samples)
        optimizer.step(state, mean)
        if round_ + 1 in {rounds * quarter // 4 for quarter in range(1, 5)}:
            losses.append(_evaluate(works[-1], models[-1], state.params, corpus))
    return losses


def _evaluate(work: Local, model: Any, params: Vector, corpus: Corpus) -> float:
    with work.holding(params):
        return validation_loss(model, corpus.validation_windows(), CPU, 16)


def _job(job: tuple[str, int, int, int]) -> tuple[str, int, list[float]]:
    return job[0], job[1], train(*job)


def main() -> None:
    """Train every way with every seed, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="the ways of the search, not those of the table")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=10, help="of 30 steps a peer")
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS, help="steps in which the learning rate rises")
    parser.add_argument(
        "--only", nargs="+", choices=[*WAYS, *SEARCH], metavar="NAME", help="rows of the table or search"
    )
    parser.add_argument("--json", type=Path, help="also write all losses here")
    given = parser.parse_args()
    given.only = given.only or list(SEARCH if given.search else WAYS)
    given.seeds = given.seeds or ([SEARCH_SEED] if given.search else [1, 2, 3])
    jobs = [(name, seed, given.rounds, given.warmup) for seed in given.seeds for name in given.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in order, with its processes
    found: dict[str, dict[int, list[float]]] = {name: {} for name in given.only}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name, seed, losses in pool.imap_unordered(_job, jobs):
            found[name][seed] = losses
            print(f"{name}, seed {seed}: {' '.join(f'{loss:.4f}' for loss in losses)}", file=sys.stderr, flush=True)
    if given.json:
        given.json.write_text(json.dumps(found))
    ends = {name: [losses[-1] for _, losses in sorted(rows.items())] for name, rows in found.items()}
    first = statistics.mean(next(iter(ends.values())))
    rows = [
        [
            name,
            *(f"{end:.4f}" for end in row),
            f"{statistics.mean(row):.4f}",
            f"{statistics.mean(row) / first - 1:+.1%}",
        ]
        for name, row in ends.items()
    ]
    print(table(["", *(f"seed {seed}" for seed in sorted(given.seeds)), "mean", "to the first"], rows))


if __name__ == "__main__":
    main()
