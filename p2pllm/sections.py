"""The sections of a run file: what an organiser may write, its units, defaults and bounds.

What does not live here: a run as a whole, its bytes and its files (`manifest`).
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII; Python writes each float as its shortest exact decimal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Section(BaseModel):
    """Frozen, and nothing in it that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    """The architecture: any causal language model that transformers' AutoConfig knows."""

    type: str = Field("llama", max_length=64, description="transformers' model_type, for example llama, qwen3, gpt2")
    config: dict[str, Any] = Field(
        default={
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        description="the model's own configuration; vocabulary and context length are filled in",
    )

    @field_validator("config")
    @classmethod
    def _plain_values(cls, config: dict[str, Any]) -> dict[str, Any]:
        try:
            canonical_json(config)
        except (ValueError, TypeError):
            raise ValueError("holds a date, inf or nan, which no model's configuration takes") from None
        return config


class TokenizerSection(Section):
    """How text becomes tokens."""

    source: str = Field(
        "bytes",
        max_length=4096,
        description='"bytes" (256 values and an end mark), or "file:PATH" of a tokenizer.json, which the run carries',
    )

    @model_validator(mode="after")
    def _known_source(self) -> Self:
        sealed = re.fullmatch(r"blake3:[0-9a-f]{64}", self.source)
        if self.source != "bytes" and not self.source.startswith("file:") and not sealed:
            raise ValueError(f'source is "{self.source}", but must be "bytes" or "file:PATH"')
        return self


class DataSection(Section):
    """The text, how it is cut, and what is held out."""

    source: str = Field(
        "stdlib",
        max_length=4096,
        description='"stdlib" (the source of the Python standard library) or "text:PATH", a file, folder or glob',
    )
    digest: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description='BLAKE3 over the text of a "text:" source; `start` fills it in',
    )
    context_length: int = Field(128, ge=8, le=1 << 20, description="tokens a sample")
    validation_fraction: float = Field(0.02, gt=0, lt=0.5, description="share of the documents that is held out")
    validation_samples: int = Field(32, ge=1, le=65536, description="held-out samples of one evaluation")
    validation_every: int = Field(10, ge=1, description="rounds between evaluations; the first and last are, too")

    @model_validator(mode="after")
    def _known_source(self) -> Self:
        if self.source != "stdlib" and not self.source.startswith("text:"):
            raise ValueError(f'source is "{self.source}", but must be "stdlib" or "text:PATH"')
        return self


class OptimizerSection(Section):
    """What learns from samples: on the averaged gradient (sync), or in every peer's own steps (diloco, sparse_loco)."""

    type: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw (arXiv 1711.05101), or muon (arXiv 2505.23725), which needs steps of a peer's own"
    )
    batch: int = Field(16, ge=1, le=65536, description="samples of one step of a peer's own; sync makes none")
    learning_rate: float = Field(4e-3, gt=0, le=10, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, a step")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment, a step")
    epsilon: float = Field(1e-8, gt=0, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, le=10, description="decoupled decay, times the learning rate, a step")
    clip_norm: float = Field(1.0, ge=0, description="largest L2 norm of a step's gradient; 0 does not clip")
    warmup_rounds: int = Field(20, ge=0, description="rounds in which the learning rate rises linearly")
    final_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="learning rate of the last round as a share of the peak; it falls linearly",
    )


class OuterSection(Section):
    """The outer step of diloco and sparse_loco: SGD on the averaged pseudo-gradient, with Nesterov momentum."""

    learning_rate: float = Field(0.7, gt=0, le=10, description="of the first round; left out: 0.7, in sparse_loco 1.0")
    momentum: float = Field(0.9, ge=0, lt=1, description="left out: 0.9, in sparse_loco 0")
    final_fraction: float = Field(
        1.0, ge=0, le=1, description="learning rate of the last round as a share of the first; it falls linearly"
    )


OUTER: dict[str, dict[str, float]] = {
    "diloco": {"learning_rate": 0.7, "momentum": 0.9},
    "sparse_loco": {"learning_rate": 1.0, "momentum": 0.0},
}
"""What the papers recommend for a strategy, unless the run file says otherwise."""


_LOCAL_STEPS = {"batch": 8, "learning_rate": 2e-3, "warmup_rounds": 3}
_MUON_STEPS = {**_LOCAL_STEPS, "type": "muon", "learning_rate": 16e-3}
_LONG_ROUNDS = {"overlap": True, "samples": 960, "deadline_s": 300.0}

SUITED: dict[str, dict[str, Any]] = {
    "sync": {},
    "diloco": {
        "optimizer": _MUON_STEPS,
        "round": {"strategy": "diloco", "codec": "int8", **_LONG_ROUNDS},
        "outer": {"learning_rate": 1.0, "momentum": 0.0},
    },
    "sparse_loco": {
        "optimizer": _LOCAL_STEPS,
        "round": {"strategy": "sparse_loco", "error_decay": 0.7, **_LONG_ROUNDS},
        "outer": {"learning_rate": 2.1},
    },
}
"""What a new run file says where a strategy's defaults, those of its paper, do not suit small models and short runs:
some 30 steps of four peers a round, and the rates that learned most with that in scripts/bench/losses.py."""


class RoundSection(Section):
    """When a round ends and how its updates are averaged."""

    strategy: Literal["sync", "diloco", "sparse_loco"] = Field(
        "sync",
        description="sync: peers average gradients every step; diloco: what many steps of their own did; "
        "sparse_loco: the same in a hundredth of the bytes",
    )
    rounds: int = Field(400, ge=1, le=10**9, description="rounds of the whole run")
    samples: int = Field(32, ge=1, le=10**9, description="samples that the swarm gathers in one round")
    deadline_s: float = Field(60.0, ge=1, le=86400, description="seconds after which a round ends with what it has")
    roster_wait_s: float = Field(
        5.0,
        ge=0.5,
        le=600,
        description="most seconds that a finished round waits for live peers; it waits as long as they lately took",
    )
    overlap: bool = Field(
        False,
        description="diloco, sparse_loco: compute on while updates travel; a round's outer step lands in the next",
    )
    fragments: int = Field(
        1,
        ge=1,
        le=64,
        description="diloco with overlap: parts of the model that rounds average in turn (Streaming DiLoCo); "
        "each round then sends so much less",
    )
    own_share: float = Field(
        0.5, ge=0, le=1, description="with fragments: share of a peer's own parameters where a fragment lands"
    )
    error_decay: float = Field(
        0.95, ge=0, lt=1, description="sparse_loco: what remains, a round, of what compression left out in earlier ones"
    )
    min_peers: int = Field(1, ge=1, le=64, description="peers that must be there for a round to begin")
    max_peers: int = Field(64, ge=1, le=64, description="largest roster of one round")
    snapshot_every: int = Field(
        25, ge=1, le=10**6, description="rounds between snapshots of the state, the same at all peers"
    )
    codec: Literal["fp32", "fp16", "bf16", "int8"] = Field(
        "fp32", description="how values travel in the all-reduce of sync and diloco"
    )

    @model_validator(mode="after")
    def _can_begin(self) -> Self:
        if self.min_peers > self.max_peers:
            raise ValueError(f"min_peers is {self.min_peers}, more than max_peers, which is {self.max_peers}")
        if self.overlap and self.strategy == "sync":
            raise ValueError("overlap is true, which needs the strategy diloco or sparse_loco")
        if self.fragments > 1 and not (self.overlap and self.strategy == "diloco"):
            raise ValueError(f"fragments is {self.fragments}, which needs the strategy diloco and overlap")
        return self
