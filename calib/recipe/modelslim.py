"""Recipes from plans of msModelSlim."""

import json
import logging
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from calib.recipe.errors import Location, RecipeError, mark, recipe_error
from calib.recipe.patterns import Patterns
from calib.recipe.recipe_file import Document

_LOG = logging.getLogger(__name__)

_SOURCE = "msModelSlim, dynamic_cache: static 8-bit ranges per channel, keys after RoPE"

_PLAN, _RECIPE = {"type", "spec", "apiversion"}, {"key", "value", "extends"}


class _Settings(BaseModel):
    """Settings of a processor; all but `symmetric` have one possible value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scope: Literal["per_channel"] = "per_channel"
    dtype: Literal["int8"] = "int8"
    symmetric: bool = True
    method: Literal["minmax"] = "minmax"


class _Processor(BaseModel):
    """One item of a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["dynamic_cache"]
    qconfig: _Settings = _Settings()
    include: Patterns = ()
    exclude: Patterns = ()


def is_modelslim(data: Any) -> bool:
    """True for a plan of msModelSlim or a list of its processors, False for a recipe."""
    if isinstance(data, list):
        return any(isinstance(item, dict) and "type" in item for item in data)
    return isinstance(data, dict) and not _PLAN.isdisjoint(data) and _RECIPE.isdisjoint(data)


def from_modelslim(plan: Document) -> Document:
    """Recipe equivalent to the cache processors of a plan.

    Without `symmetric`, a range that does not contain zero is not widened to it, as msModelSlim does: steps are equal
    or finer.

    Parameters
    ----------
    plan : Document
        A processor, a list of them, or a whole plan with `spec: {process: [...]}`.

    Raises
    ------
    RecipeError
        If no processor is for the cache, or one has settings that msModelSlim does not support.
    """
    items = _items(plan)
    about_cache = [part for part in items if isinstance(part.data, dict) and part.data.get("type") == "dynamic_cache"]
    others = [_describe(part) for part in items if part not in about_cache]
    if not about_cache:
        raise RecipeError(
            f"recipe {mark((), plan.where, plan.marks)}: expected a processor of type dynamic_cache; got "
            f"{', '.join(others) or 'none at all'}"
        )
    if others:
        _LOG.warning("recipe %s: ignored, not for the cache: %s", plan.where, ", ".join(others))
    processors = [_validated(part) for part in about_cache]
    if len({processor.exclude for processor in processors}) > 1:
        raise RecipeError(
            f"recipe {mark((), about_cache[1].where, about_cache[1].marks)}: expected the same exclude in all "
            "processors; got different ones; use one exclude, or a kvgauge recipe with overrides"
        )
    return Document(plan.where, _recipe(processors), {(): mark((), plan.where, about_cache[0].marks)})


def _items(plan: Document) -> list[Document]:
    if isinstance(plan.data, list):
        return [plan.part((number,)) for number in range(len(plan.data))]
    if "type" in plan.data:
        return [plan]
    spec = plan.data.get("spec")
    process = spec.get("process") if isinstance(spec, dict) else None
    if not isinstance(process, list):
        place: Location = ("spec", "process")
        raise RecipeError(
            f"recipe {mark(place, plan.where, plan.marks)}: spec.process: expected the list of processors of a plan "
            f"of msModelSlim, such as spec: {{process: [{{type: dynamic_cache}}]}}; got {process!r:.80}"
        )
    return [plan.part(("spec", "process", number)) for number in range(len(process))]


def _describe(part: Document) -> str:
    kind = part.data.get("type") if isinstance(part.data, dict) else part.data
    return f"{kind!r:.60} ({mark((), part.where, part.marks)})"


def _validated(part: Document) -> _Processor:
    try:
        return _Processor.model_validate_json(json.dumps(part.data), strict=True)
    except ValidationError as error:
        raise recipe_error(error, _Processor, part.where, part.marks) from error


def _recipe(processors: list[_Processor]) -> dict[str, Any]:
    """Recipe with the settings of the first processor, and overrides for later ones."""
    first = processors[0]
    entry = {"method": "uniform", "bits": 8, "per": "channel", "symmetric": first.qconfig.symmetric}
    includes = [list(processor.include) or ["*"] for processor in processors]
    # A plan lists processors with patterns; a recipe has one entry per tensor, so later processors become overrides.
    overrides = [
        {"sites": include, **{tensor: {"symmetric": later.qconfig.symmetric} for tensor in ("key", "value")}}
        for later, include in zip(processors[1:], includes[1:], strict=True)
    ]
    return {
        "source": _SOURCE,
        "stage": "post_rope",
        "key": entry,
        "value": entry,
        "include": [pattern for include in includes for pattern in include],
        "exclude": list(first.exclude),
        "overrides": overrides,
    }
