"""Recipes with some entries changed, as a line of a grid or a trial of a search names them."""

from collections.abc import Mapping
from typing import Any

from calib.recipe.override import merged
from calib.recipe.recipe import Recipe

_NO_OUTLIERS = ("outliers", "fraction")


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes by dotted names as entries of a recipe; an outlier fraction of zero is no outliers.

    Examples
    --------
    >>> nested({"key.bits": 2, "key.outliers.fraction": 0, "sink_tokens": 1})
    {'key': {'bits': 2, 'outliers': None}, 'sink_tokens': 1}
    """
    found: dict[str, Any] = {}
    for name, value in changes.items():
        parts = name.split(".")
        if tuple(parts[-2:]) == _NO_OUTLIERS and value == 0:
            parts, value = parts[:-1], None
        for part in reversed(parts):
            value = {part: value}
        found = merged(found, value)
    return found


def edited(recipe: Recipe, changes: Mapping[str, Any], name: str | None = None) -> Recipe:
    """The recipe with changes by dotted names, called after them where it is given no name.

    Raises
    ------
    RecipeError
        If the result is none.
    """
    given = " ".join([recipe.name, *(f"{entry}={value}" for entry, value in changes.items())])
    return recipe.edited({**nested(changes), "name": name or given})
