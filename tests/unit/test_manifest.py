"""RunDraft and RunManifest: defaults, the template, canonical bytes, and what is refused."""

import json
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from p2pllm.errors import ManifestError
from p2pllm.manifest import MAX_MANIFEST_BYTES, RunDraft, RunManifest, draft_template, load_draft
from p2pllm.sections import SUITED, OuterSection, RoundSection

FOUNDER = "12D3KooWNMszKZCCPkRwtMBfzXuSxBMMpmy5S1oHfVAqUGwXfyyE"
GOLDEN_DRAFT = "43f98c88952f0a78f229e5a36da182e276138e1e7ea107277998dab2160510fe"
GOLDEN_RUN = "99f3e0971a0d1e9b011d0dc7ef08fdb0890342345ff441c0d40e8d9d13819f79"
"""They change with every field, default or spelling of a number, and then old runs and new peers do not meet: change
them on purpose only."""


def sealed() -> RunManifest:
    return RunDraft().seal(founder=FOUNDER, initial_state="5a" * 32, tokenizer="bytes", data_digest="")


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    kinds = [field.annotation for field in model.model_fields.values()]
    return [model, *(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_golden_digests() -> None:
    assert RunDraft().digest() == GOLDEN_DRAFT
    assert sealed().run_id == GOLDEN_RUN


def test_the_template_is_the_default_run(tmp_path: Path) -> None:
    assert load_draft(written(tmp_path, draft_template())) == RunDraft()


@pytest.mark.parametrize("strategy", get_args(RoundSection.model_fields["strategy"].annotation))
def test_a_template_suits_its_strategy(tmp_path: Path, strategy: str) -> None:
    draft = load_draft(written(tmp_path, draft_template(strategy)))
    assert draft == RunDraft.model_validate(SUITED[strategy])
    assert draft.round.strategy == strategy
    local = strategy != "sync"
    assert draft.round.overlap is local and (draft.round.samples >= 100 * draft.optimizer.batch) is local


def test_the_template_shows_every_field_but_the_digest() -> None:
    shown = tomllib.loads(draft_template())
    everything = RunDraft().model_dump(mode="json")
    del everything["data"]["digest"]  # `start` fills it in
    assert everything.pop("outer").keys() == OuterSection.model_fields.keys()
    assert shown.pop("outer") == {}, "it depends on the strategy"
    assert all(f"# {field} = " in draft_template() for field in OuterSection.model_fields)
    assert shown == everything


@pytest.mark.parametrize("section", sections(RunManifest), ids=lambda section: section.__name__)
def test_every_field_says_what_it_is(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        assert field.description or isinstance(field.default, BaseModel), name
    assert section.__doc__


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    assert load_draft(written(tmp_path, "")) == RunDraft()


def test_canonical_bytes_do_not_depend_on_how_a_run_is_written(tmp_path: Path) -> None:
    one = load_draft(written(tmp_path, "seed = 3\n[round]\nsamples = 8\ndeadline_s = 30\n"))
    other = load_draft(written(tmp_path, "round = {deadline_s = 3e1, samples = 0x8}\nseed = 3\n"))
    assert one.canonical_bytes() == other.canonical_bytes()
    assert one.digest() != RunDraft().digest()


def test_another_value_anywhere_is_another_run() -> None:
    draft, ids, changes = RunDraft(), {RunDraft().digest()}, 0
    for name in ("model", "data", "optimizer", "outer", "round"):
        section = getattr(draft, name)
        for field, value in section.model_dump().items():
            if isinstance(value, (int, float)):
                another = not value if isinstance(value, bool) else value + 1
                changed = section.model_copy(update={field: another})
                ids.add(draft.model_copy(update={name: changed}).digest())
                changes += 1
    assert len(ids) == 1 + changes > 15


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    draft = load_draft(written(tmp_path, '[data]\nsource = "text:books/*.txt"\n[tokenizer]\nsource = "file:/t.json"\n'))
    assert draft.data.source == f"text:{tmp_path}/books/*.txt"
    assert draft.tokenizer.source == "file:/t.json"


def test_seal_fills_in_what_start_finds_out() -> None:
    manifest = RunDraft().seal(
        founder=FOUNDER, initial_state="5a" * 32, tokenizer=f"blake3:{'ab' * 32}", data_digest="cd" * 32
    )
    assert (manifest.founder, manifest.initial_state, manifest.format) == (FOUNDER, "5a" * 32, 1)
    assert manifest.tokenizer.source == f"blake3:{'ab' * 32}"
    assert manifest.data.digest == "cd" * 32
    assert manifest.round == RunDraft().round and manifest.model == RunDraft().model


def test_canonical_bytes_come_back() -> None:
    manifest = sealed()
    assert RunManifest.from_bytes(manifest.canonical_bytes(), manifest.run_id) == manifest


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b" ",
        lambda data: data.replace(b'"seed":0', b'"seed":0.0'),
        lambda data: data.replace(b'"seed":0', b'"seed":"0"'),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: json.dumps(dict(reversed(json.loads(data).items())), separators=(",", ":")).encode(),
    ],
    ids=["space", "float", "text", "spaces", "order"],
)
def test_only_canonical_bytes_are_taken(spoil) -> None:
    with pytest.raises(ManifestError, match=r"canonical form"):
        RunManifest.from_bytes(spoil(sealed().canonical_bytes()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid"),
        (b"null", "not valid"),
        (b"\xff\xfe", "not valid"),
        (b"[" * 10_000, "not valid"),
        (b"{}", "founder is missing"),
        (sealed().canonical_bytes().replace(b'"format":1', b'"format":2'), "format"),
        (sealed().canonical_bytes().replace(b'"format":1', b'"format":1,"more":1'), "more is not a known field"),
        (sealed().canonical_bytes().replace(b'"seed":0', b'"seed":-1'), "seed"),
        (b"x" * (MAX_MANIFEST_BYTES + 1), str(MAX_MANIFEST_BYTES)),
    ],
    ids=["nothing", "null", "no-text", "nested", "empty", "format", "more", "range", "oversize"],
)
def test_what_is_no_manifest_is_refused_in_one_sentence(data: bytes, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        RunManifest.from_bytes(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_the_manifest_of_another_run_is_refused() -> None:
    with pytest.raises(ManifestError, match="not the manifest of run abab"):
        RunManifest.from_bytes(sealed().canonical_bytes(), "ab" * 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("roud = 1", r"roud is not a known field \(did you mean round\?\)"),
        ("[round]\nsampels = 1", r"round\.sampels is not a known field \(did you mean samples\?\)"),
        ("[round]\nzzz = 1", r"round\.zzz is not a known field\."),
        ("[model.config]\na = inf", r"model\.config: holds a date, inf or nan"),
        ("[model.config]\na = [{b = 1979-05-27}]", r"model\.config: holds a date, inf or nan"),
        ("[round]\nsamples = 1.5", r"round\.samples: must be a valid integer"),
        ("[round]\nsamples = true\nrounds = 0", r"round\.(samples|rounds)"),
        ('name = "' + "x" * 999 + '"', r"name: .*64"),
        ('[data]\nsource = "ftp:x"', r'data: source is "ftp:x"'),
        ('[data]\ndigest = "12"', r"data\.digest does not fit \(it is '12'\): BLAKE3"),
        ("round = 3", r"round: must be"),
    ],
)
def test_a_wrong_run_file_names_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ManifestError, match=words) as caught:
        load_draft(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < len(str(path)) + 300
