"""RunManifest: everything that all peers of a run must agree on, and nothing that one peer may choose.

A `RunDraft` is what an organiser writes (TOML). `seal` turns it into a `RunManifest`: the founder's key, the
digest of the initial weights, and the digests of files that it names are filled in, and from then on it is
frozen. Its canonical bytes hash to the run id, so whoever holds a run id can check a manifest that a stranger
sent.

What does not live here: what one peer may choose (`settings`), signing (`identity`), reading data (`training`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from p2pllm.errors import ManifestError
from p2pllm.explain import explain
from p2pllm.toml import read_toml

MAX_MANIFEST_BYTES = 64 * 1024
"""Bound on the canonical bytes of a manifest that is accepted from the network."""

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(_Section):
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


class TokenizerSection(_Section):
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


class DataSection(_Section):
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


class OptimizerSection(_Section):
    """AdamW (arXiv 1711.05101) on the averaged gradient, and the schedule of its learning rate."""

    learning_rate: float = Field(4e-3, gt=0, le=10, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, a round")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment, a round")
    epsilon: float = Field(1e-8, gt=0, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, le=10, description="decoupled decay, times the learning rate, a round")
    clip_norm: float = Field(1.0, ge=0, description="largest L2 norm of the averaged gradient; 0 does not clip")
    warmup_rounds: int = Field(20, ge=0, description="rounds in which the learning rate rises linearly")
    final_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="learning rate of the last round as a share of the peak; it falls linearly",
    )


class RoundSection(_Section):
    """When a round ends and how its updates are averaged."""

    strategy: Literal["sync"] = Field("sync", description="sync: peers average gradients, then all apply the same step")
    rounds: int = Field(400, ge=1, le=10**9, description="rounds of the whole run")
    samples: int = Field(32, ge=1, le=10**9, description="samples that the swarm gathers in one round")
    deadline_s: float = Field(60.0, ge=1, le=86400, description="seconds after which a round ends with what it has")
    roster_wait_s: float = Field(
        5.0,
        ge=0.5,
        le=600,
        description="most seconds that a finished round waits for live peers; it waits as long as they lately took",
    )
    min_peers: int = Field(1, ge=1, le=64, description="peers that must be there for a round to begin")
    max_peers: int = Field(64, ge=1, le=64, description="largest roster of one round")
    snapshot_every: int = Field(
        25, ge=1, le=10**6, description="rounds between snapshots of the state, the same at all peers"
    )
    codec: Literal["fp32", "fp16"] = Field("fp32", description="how values travel in the all-reduce")

    @model_validator(mode="after")
    def _can_begin(self) -> Self:
        if self.min_peers > self.max_peers:
            raise ValueError(f"min_peers is {self.min_peers}, more than max_peers, which is {self.max_peers}")
        return self


class RunDraft(_Section):
    """What an organiser writes. Every section may be left out; its defaults then hold."""

    name: str = Field(
        "stdlib-llama",
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="a short name for people; letters, digits, dots and dashes",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the initial weights and of every draw of data")
    model: ModelSection = ModelSection()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    round: RoundSection = RoundSection()

    def canonical_bytes(self) -> bytes:
        """The one byte string of this value: JSON, keys sorted, no spaces, shortest floats."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """BLAKE3 of the canonical bytes, in hex."""
        return blake3(self.canonical_bytes()).hexdigest()

    def seal(self, *, founder: str, initial_state: str, tokenizer: str, data_digest: str) -> RunManifest:
        """Fix everything that `start` finds out.

        founder: peer id of the founder. initial_state: digest of the state at round 0, hex.
        tokenizer: "bytes" or "blake3:HEX" of the tokenizer.json. data_digest: hex, or "" where any text serves.
        """
        fields = self.model_dump()
        fields["tokenizer"]["source"] = tokenizer
        fields["data"]["digest"] = data_digest
        return RunManifest(**fields, founder=founder, initial_state=initial_state)


class RunManifest(RunDraft):
    """A sealed draft: what the run id is the hash of."""

    format: Literal[1] = Field(1, description="version of this format")
    founder: str = Field(min_length=8, max_length=128, description="peer id whose key signs the manifest")
    initial_state: HexDigest = Field(description="digest of the state at round 0")

    @model_validator(mode="after")
    def _text_is_known(self) -> Self:
        # A founder could otherwise have volunteers train on whatever lies at that path on their machines.
        if self.data.source != "stdlib" and not self.data.digest:
            raise ValueError("data.digest is missing, so nobody could tell whether a text is the run's")
        return self

    @property
    def run_id(self) -> str:
        """BLAKE3 of the canonical bytes, 64 hex digits."""
        return self.digest()

    @classmethod
    def from_bytes(cls, data: bytes, run_id: str | None = None) -> RunManifest:
        """Parse canonical bytes; with `run_id`, only the manifest of that run is accepted.

        Raises ManifestError if the bytes are too many, malformed, not canonical, or of another run.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"The manifest has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} allowed.")
        if run_id is not None and blake3(data).hexdigest() != run_id:
            raise ManifestError(f"This is not the manifest of run {run_id[:16]}.")
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise ManifestError(f"The manifest is not valid: {explain(error, cls)}.") from None
        if manifest.canonical_bytes() != data:
            raise ManifestError("The manifest is not in its canonical form; another version of p2pllm wrote it.")
        return manifest


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII; Python writes each float as its shortest exact decimal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def load_draft(path: Path) -> RunDraft:
    """Read a draft from a TOML file; paths in it are taken relative to the file.

    Raises ManifestError with the file, the field and what is wrong with it.
    """
    raw = read_toml(
        path,
        ManifestError,
        missing=f"`p2pllm new {path}` writes one to edit",
        no_text="is not a run file: it holds no UTF-8 text",
    )
    try:
        draft = RunDraft.model_validate(raw)
    except ValidationError as error:
        raise ManifestError(f"{path} is not a valid run: {explain(error, RunDraft)}.") from None
    return draft.model_copy(
        update={
            "tokenizer": TokenizerSection(source=_anchored(draft.tokenizer.source, "file:", path.parent)),
            "data": draft.data.model_copy(update={"source": _anchored(draft.data.source, "text:", path.parent)}),
        }
    )


def _anchored(source: str, prefix: str, folder: Path) -> str:
    """Make the path of a `prefix` source absolute."""
    if not source.startswith(prefix):
        return source
    return prefix + str((folder / Path(source.removeprefix(prefix)).expanduser()).absolute())


def draft_template() -> str:
    """A commented TOML file with every field, its default, its unit and what it means."""
    draft = RunDraft()
    lines = [
        "# A run of p2pllm: what all its peers agree on. Edit, then: p2pllm start <this file>",
        "# Once started a run never changes; another value anywhere makes another run.",
        "",
    ]
    lines += _field_lines(draft)
    for name in ("model", "tokenizer", "data", "optimizer", "round"):
        section = getattr(draft, name)
        lines += ["", f"[{name}]  # {(type(section).__doc__ or '').splitlines()[0]}", *_field_lines(section)]
        if name == "model":
            lines += ["", f"[model.config]  # {ModelSection.model_fields['config'].description}"]
            lines += [f"{key} = {_toml(value)}" for key, value in section.config.items()]
    return "\n".join(lines) + "\n"


def _field_lines(section: BaseModel) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, (BaseModel, dict)) or (name == "digest"):
            continue
        lines.append(f"{f'{name} = {_toml(value)}':<32}# {field.description}")
    return lines


def _toml(value: object) -> str:
    """A TOML scalar; JSON's spelling of text, numbers and truth values is also TOML's."""
    return json.dumps(value)
