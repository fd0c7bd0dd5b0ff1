"""RunManifest: everything that all peers of a run must agree on, and nothing that one peer may choose.

A `RunDraft` is what an organiser writes (TOML). `seal` turns it into a `RunManifest`: the founder's key, the
digest of the initial weights, and the digests of files that it names are filled in, and from then on it is
frozen. Its canonical bytes hash to the run id, so whoever holds a run id can check a manifest that a stranger
sent.

What does not live here: the fields themselves (`sections`), what one peer may choose (`settings`), signing
(`identity`), reading data (`training`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from blake3 import blake3
from pydantic import BaseModel, Field, ValidationError, model_validator

from p2pllm.errors import ManifestError
from p2pllm.explain import explain
from p2pllm.sections import (
    OUTER,
    SUITED,
    DataSection,
    ModelSection,
    OptimizerSection,
    OuterSection,
    RoundSection,
    Section,
    TokenizerSection,
    canonical_json,
)
from p2pllm.toml import read_toml

MAX_MANIFEST_BYTES = 64 * 1024
"""Bound on the canonical bytes of a manifest that is accepted from the network."""

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RunDraft(Section):
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
    outer: OuterSection = OuterSection()
    round: RoundSection = RoundSection()

    @model_validator(mode="before")
    @classmethod
    def _outer_of_the_strategy(cls, raw: Any) -> Any:
        """What is left out of [outer] depends on the strategy."""
        round_, outer = (raw.get(name, {}) for name in ("round", "outer")) if isinstance(raw, dict) else ({}, None)
        strategy = round_.get("strategy") if isinstance(round_, dict) else getattr(round_, "strategy", None)
        if isinstance(outer, dict) and isinstance(strategy, str):
            return {**raw, "outer": {**OUTER.get(strategy, {}), **outer}}
        return raw

    @model_validator(mode="after")
    def _has_steps_of_its_own(self) -> Self:
        if self.optimizer.type != "adamw" and self.round.strategy == "sync":
            raise ValueError(f"optimizer.type is {self.optimizer.type}, which needs the strategy diloco or sparse_loco")
        return self

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


def draft_template(strategy: str = "sync") -> str:
    """A commented TOML file with every field, a value that suits the strategy, its unit and what it means."""
    draft = RunDraft.model_validate(SUITED[strategy])
    lines = [
        "# A run of p2pllm: what all its peers agree on. Edit, then: p2pllm start <this file>",
        "# Once started a run never changes; another value anywhere makes another run.",
        "",
    ]
    lines += _field_lines(draft)
    for name in ("model", "tokenizer", "data", "optimizer", "round", "outer"):
        section = getattr(draft, name)
        fields = _field_lines(section)
        if name == "outer":  # what is left out depends on the strategy
            suited = SUITED[strategy].get(name, {})
            fields = [line if line.split()[0] in suited else f"# {line}" for line in fields]
        lines += ["", f"[{name}]  # {(type(section).__doc__ or '').splitlines()[0]}", *fields]
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
