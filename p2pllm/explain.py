"""What pydantic finds wrong, said to people: a phrase that names the field. Used for manifests and settings."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error as a phrase: where, what, and what was given."""
    problem = error.errors(include_url=False)[0]
    place = [str(part) for part in problem["loc"]]
    where = ".".join(place) or "the file"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place[-1], _fields_at(model, place[:-1]), n=1)
        return f"{where} is not a known field{f' (did you mean {close[0]}?)' if close else ''}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    given = problem.get("input")
    shown = f" (it is {str(given)[:60]!r})" if isinstance(given, (str, int, float, bool)) else ""
    field = _fields_at(model, place[:-1]).get(place[-1]) if place else None
    if problem["type"] == "string_pattern_mismatch" and field is not None:
        return f"{where} does not fit{shown}: {field.description}"
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    text = text.partition(", unable to ")[0]
    return f"{where}: {text[0].lower()}{text[1:]}{shown}"


def _fields_at(model: type[BaseModel], place: list[str]) -> dict[str, FieldInfo]:
    """The fields of the section that `place` leads to; none where it leads to no section."""
    for name in place:
        section = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return {}
        model = section
    return dict(model.model_fields)
