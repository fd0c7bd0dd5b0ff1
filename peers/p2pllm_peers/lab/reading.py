"""Scenario files: found, read, put together with their [short] and their run file, checked; and described.

    about = "two peers on slow lines"    name is that of the file
    duration_s = 120
    [run.round]                          sections of a run file, or `file = "run.toml"` beside this one
    samples = 200
    [links.home]
    up_mbit = 20
    down_mbit = 100
    delay_ms = [20, 60]
    [[peers]]
    count = 2
    link = "home"
    [[events]]
    at_s = 30
    do = "kill"
    peer = "peer-1"
    for_s = 20
    [short]                              with --short these replace the above: tables field by field, arrays whole
    duration_s = 60

What does not live here: the fields (`scenario`) and what must fit together (`checks`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from p2pllm.errors import UsageError
from p2pllm.explain import explain
from p2pllm.manifest import RunDraft
from p2pllm.toml import read_toml
from p2pllm_peers.lab.checks import FIELDS, check, like
from p2pllm_peers.lab.scenario import Churn, Event, Link, Peers, Scenario, Verdict

SHIPPED = Path(__file__).parent / "scenarios"

_Model = TypeVar("_Model", bound=BaseModel)

_PATHS = (("data", "text:"), ("tokenizer", "file:"))
_TABLES: dict[str, type[BaseModel]] = {"churn": Churn, "verdict": Verdict}
_ARRAYS: dict[str, type[BaseModel]] = {"peers": Peers, "events": Event}


def read_scenario(name_or_path: str, *, short: bool, seed: int | None) -> Scenario:
    """See `scenario.load_scenario`. The other form is checked, too, so that a file is right for both."""
    path = _find(name_or_path)
    raw = _toml(path)
    shorter = raw.pop("short", None)
    if short and shorter is None:
        raise UsageError(f"{path} has no short form; add a section [short] to it, or run it without --short.")
    if shorter is not None and not isinstance(shorter, dict):
        raise UsageError(f"{path} is not a valid scenario: short is no section; write [short].")
    if seed is not None:
        raw |= {"seed": seed}
    whole = _scenario(raw, path, "")
    if shorter is None:
        return whole
    brief = _scenario(_merged(raw, shorter if seed is None else shorter | {"seed": seed}), path, " with [short]")
    return brief if short else whole


def describe() -> list[tuple[str, str, str]]:
    """See `scenario.describe`."""
    (place, _, meaning), *others = _rows("", Scenario)
    rows = [
        (place, "the file's", meaning),
        *others,
        ("[run]", "the default run", "sections of a run file, see p2pllm new"),
    ]
    rows.append(("[run] file", "none", "path of a run file for what is not said here, relative to the scenario"))
    rows += _rows("[links.NAME] ", Link) + _rows("[[peers]] ", Peers) + _rows("[[events]] ", Event)
    rows += [("[[events]] do", f'"{do}"', fields.sentence()) for do, fields in FIELDS.items()]
    rows += _rows("[churn] ", Churn) + _rows("[verdict] ", Verdict)
    return [*rows, ("[short]", "none", "any of the above, which --short puts in its place; arrays are replaced whole")]


def _rows(place: str, model: type[BaseModel]) -> list[tuple[str, str, str]]:
    return [
        (place + name, "required" if field.is_required() else _shown(field.default), field.description)
        for name, field in model.model_fields.items()
        if field.description
    ]


def _shown(default: object) -> str:
    if default is None or default == {}:
        return "none" if default == {} else "not checked"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"[{', '.join(map(_shown, default))}]"
    return (
        f"{default:g}" if isinstance(default, float) else f'"{default}"' if isinstance(default, str) else str(default)
    )


def _find(name_or_path: str) -> Path:
    names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    if name_or_path in names:
        return SHIPPED / f"{name_or_path}.toml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix == ".toml" or "/" in name_or_path:
        raise UsageError(f"There is no file {path}; correct the path, or name one of {', '.join(names)}.")
    raise UsageError(
        f'There is no scenario "{name_or_path[:60]}"{like(name_or_path, names)}; '
        f"name one of {', '.join(names)}, or a TOML file."
    )


def _toml(path: Path) -> dict[str, Any]:
    return read_toml(path, UsageError, missing="correct the path", no_text="holds no UTF-8 text; give a TOML file")


def _merged(raw: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`raw` with what `over` says: tables field by field, anything else whole."""
    merged = raw | over
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            merged[key] = _merged(raw[key], value)
    return merged


def _scenario(raw: dict[str, Any], path: Path, form: str) -> Scenario:
    try:
        scenario = _section(Scenario, {"name": path.stem} | _parts(raw, path), "")
        check(scenario)
    except UsageError as error:
        raise UsageError(f"{path} is not a valid scenario{form}: {str(error).rstrip('.')}.") from None
    return scenario


def _parts(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Each section checked by itself, so that what is wrong is named by the place that the file gives it."""
    parts = dict(raw)
    if isinstance(raw.get("run"), dict):
        parts["run"] = _section(RunDraft, _run(raw["run"], path.parent), "[run] ")
    for name, model in _TABLES.items():
        if isinstance(raw.get(name), dict):
            parts[name] = _section(model, raw[name], f"[{name}] ")
    for name, model in _ARRAYS.items():
        if isinstance(raw.get(name), list):
            rows = enumerate(raw[name], 1)
            parts[name] = tuple(_section(model, row, f"[[{name}]] {number} ") for number, row in rows)
    if isinstance(raw.get("links"), dict):
        parts["links"] = {name: _section(Link, link, f"[links.{name}] ") for name, link in raw["links"].items()}
    return parts


def _run(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The run file that the section names, if any, with what else it says; paths are made absolute."""
    file = section.get("file")
    here = _anchored({key: value for key, value in section.items() if key != "file"}, folder)
    if file is None:
        return here
    if not isinstance(file, str):
        raise UsageError(f"[run] file: is {file}, but must be the path of a run file")
    path = folder / Path(file).expanduser()
    return _merged(_anchored(_toml(path), path.parent), here)


def _anchored(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    anchored = dict(run)
    for name, prefix in _PATHS:
        section = run.get(name)
        source = section.get("source") if isinstance(section, dict) else None
        if isinstance(source, str) and source.startswith(prefix):
            where = folder / Path(source.removeprefix(prefix)).expanduser()
            anchored[name] = {**run[name], "source": prefix + str(where.absolute())}
    return anchored


def _section(model: type[_Model], raw: object, place: str) -> _Model:
    if not isinstance(raw, dict):
        raise UsageError(f"{place}must be a section of its own, but is {str(raw)[:60]}")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UsageError(place + explain(error, model)) from None
