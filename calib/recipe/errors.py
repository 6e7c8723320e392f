"""Errors of recipes, with file and line, the reason, the value found, and the nearest valid one."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from artifacts.errors import KVGaugeError

Location = tuple[str | int, ...]
"""Path in a recipe: names of entries and numbers of items, from the top."""

Marks = Mapping[Location, str]
"""`FILE, line N` of the locations that a file contains; `()` is the whole file."""


_FORMER_METHODS = {"allotted": "mixed_codebook"}
"""Names of methods in recipes written before kvgauge, where the new one is not similar."""

_EXPECTED = {
    **dict.fromkeys(("model_type", "dict_type"), "must be entries, such as {method: uniform}"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("too_short", "string_too_short"), "must not be empty"),
}
"""Messages in place of pydantic's, by error type."""


class RecipeError(KVGaugeError, ValueError):
    """A recipe cannot be read, or its settings contradict each other."""


class _Place(NamedTuple):
    """Location in a recipe, models that may contain its last part, and models that it may be."""

    location: Location
    holders: list[type[BaseModel]]
    models: list[type[BaseModel]]


def recipe_error(error: ValidationError, kind: Any, where: str, marks: Marks) -> RecipeError:
    """Error with one line for each finding of pydantic.

    Parameters
    ----------
    error : ValidationError
        Findings.
    kind : type or annotation
        Validated type, from which the valid names at each location are taken.
    where : str
        Name of the recipe, for locations without a mark.
    marks : Marks
        File and line of each entry.
    """
    # Of a union pydantic reports every member's failure: join those of one location, and drop a location if there are
    # findings inside it, which are more specific.
    reasons: dict[Location, list[str]] = {}
    for row in error.errors():
        place = _trace(kind, row["loc"])
        reasons.setdefault(place.location, []).append(_reason(row, place))
    rows = (
        f"recipe {mark(location, where, marks)}: {'.'.join(map(str, location)) or 'the recipe'}: {' or '.join(found)}"
        for location, found in reasons.items()
        if not any(inside[: len(location)] == location for inside in reasons if inside != location)
    )
    return RecipeError("\n".join(rows))


def mark(location: Location, where: str, marks: Marks) -> str:
    """File and line of a location, or else of the nearest entry around it."""
    # A setting of an `inner` entry may be written one level up, see `override.merged`: look there too.
    short = tuple(part for part in location[:-1] if part != "inner") + location[-1:]
    holders = (location[:end] for end in reversed(range(len(location))))
    return next((marks[place] for place in (location, short, *holders) if place in marks), where)


def nearest(word: object, known: Iterable[str]) -> str:
    """Suggestion ` Did you mean X?` with the most similar known word, or an empty text."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _trace(kind: Any, location: Location) -> _Place:
    """Location without the parts that pydantic inserts: tags of methods and names of union members."""
    path: list[str | int] = []
    holders, models = [], _models(kind)
    for part in location:
        tagged = [model for model in models if part == _method(model)]
        if tagged and len(models) > 1:
            models = tagged
        elif isinstance(part, int):
            path.append(part)
        elif models:
            path.append(part)
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            holders, models = models, [model for field in fields for model in _models(field.annotation)]
    return _Place(tuple(path), holders, models)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _method(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("method")
    return field.default if field and get_origin(field.annotation) is Literal else None


def _reason(row: Any, place: _Place) -> str:
    kind, got = row["type"], row["input"]
    methods = [method for model in place.models if (method := _method(model))]
    if kind == "value_error":
        return str(row["ctx"]["error"])
    if kind == "missing":
        return "missing; add it"
    if kind == "extra_forbidden":
        return _unknown("unknown entry", place.location[-1], _entries(place.holders))
    if kind == "union_tag_invalid":
        method = row["ctx"]["tag"]
        return _unknown(f"unknown method {method!r}", _FORMER_METHODS.get(method, method), methods)
    if kind == "union_tag_not_found":
        return _unknown("method is missing", "", methods)
    message = _EXPECTED.get(kind, row["msg"].replace("Input should be", "must be"))
    return f"{message}; got {got!r:.80}" + _advice(row, row.get("ctx", {}))


def _unknown(what: str, word: object, known: list[str]) -> str:
    return f"{what}; known: {', '.join(known)}." + nearest(word, known)


def _entries(models: list[type[BaseModel]]) -> list[str]:
    known = {name: None for model in models for name in (*model.model_fields, *getattr(model, "file_entries", ()))}
    return list(known)


def _advice(row: Any, context: Mapping[str, Any]) -> str:
    kind, got = row["type"], row["input"]
    if got == 16 and row["loc"][-1] == "bits" and "le" in context:
        return f"; use {context['le']}, or method: identity, which keeps 16 bits"
    for bound in ("le", "ge"):
        if bound in context:
            return f"; use {context[bound]}"
    if kind == "literal_error":
        near = nearest(got, str(context["expected"]).split("'")[1::2])
        return f".{near}" if near else ""
    if kind in ("int_type", "float_type") and isinstance(got, str):
        return _as_number(got)
    return ""


def _as_number(text: str) -> str:
    """Advice for numbers that YAML reads as text, such as `1e-3` and `"4"`."""
    try:
        number = int(text) if text.strip("+-").isdigit() else float(text)
    except ValueError:
        return ""
    return f"; write {yaml.safe_dump(number).split()[0]}"
