"""Recipes: which estimator for keys, which for values, and where keys are taken."""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from artifacts.sites import Site, Stage
from calib.estimators import AnyEstimator, Estimator

_SHIPPED = resources.files("calib") / "recipes"


class RecipeError(ValueError):
    """A recipe cannot be read, or asks for what does not go together."""


class Recipe(BaseModel):
    """How the quantizers of a model are found.

    Parameters
    ----------
    name : str
        For file names and tables.
    source : str
        What it reproduces, with its paper.
    stage : {'pre_rope', 'post_rope'}
        Where keys are taken.
    key, value : estimator
        Hyper-parameters of the estimators for all layers.
    sink_tokens : int
        First positions of a sequence that stay exact and take no part in the fit, 0 to 8.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str = ""
    stage: Stage = "pre_rope"
    key: AnyEstimator
    value: AnyEstimator
    sink_tokens: int = Field(default=0, ge=0, le=8)

    def estimator(self, site: Site) -> Estimator:
        """The estimator for a cached site."""
        return self.key if site.tensor == "key" else self.value

    def edited(self, changes: dict[str, Any]) -> "Recipe":
        """The recipe with some entries changed, such as `{"key": {"bits": 3}}`, and checked again.

        Raises
        ------
        RecipeError
            If the result is none.
        """
        return self.parse(_merged(self.model_dump(mode="json"), changes), self.name)

    def to_yaml(self) -> str:
        """The recipe as the text of a recipe file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def parse(cls, data: object, where: str) -> "Recipe":
        """A recipe from plain values.

        Raises
        ------
        RecipeError
            With every entry that is wrong, what was expected, and the nearest known name.
        """
        if not isinstance(data, dict):
            got = "an empty file" if data is None else f"{data!r:.80}"
            raise RecipeError(f"recipe {where}: expected entries; got {got}; start from `calibrate --print-recipe`")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            rows = [f"  {_place(row['loc'])}: {_advice(row)}" for row in error.errors()]
            raise RecipeError(f"recipe {where}:\n" + "\n".join(rows)) from error


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(Path(entry.name).stem for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a `.yaml` file.

    Raises
    ------
    RecipeError
        If there is none, or it is not well-formed.
    """
    if name in shipped_recipes():
        return Recipe.parse(yaml.safe_load((_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")), name)
    path = Path(name)
    if not path.is_file():
        got = "no such file" if path.suffix in (".yaml", ".yml") else "no such recipe"
        raise RecipeError(
            f"recipe {name!r}: {got}; expected a .yaml file or one of {', '.join(shipped_recipes())}."
            + _nearest(name, shipped_recipes())
        )
    try:
        return Recipe.parse(yaml.safe_load(path.read_text(encoding="utf-8")), name)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name}: not YAML: {error}") from error


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, change in changes.items():
        old = merged.get(name)
        fresh_method = isinstance(change, dict) and "method" in change
        merged[name] = (
            _merged(old, change) if isinstance(old, dict) and isinstance(change, dict) and not fresh_method else change
        )
    return merged


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(top)"


def _advice(row: Any) -> str:
    if row["type"] == "union_tag_invalid":
        method, known = row["ctx"]["tag"], re.findall(r"'(\w+)'", row["ctx"]["expected_tags"])
        return f"unknown method {method!r}; known: {', '.join(known)}." + _nearest(method, known)
    message = f"{row['msg']}; got {row['input']!r:.80}"
    if row["type"] != "extra_forbidden":
        return message
    known = _known_names(row["loc"])
    return f"unknown entry; known: {', '.join(known)}." + _nearest(row["loc"][-1], known)


def _nearest(word: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _known_names(location: tuple[int | str, ...]) -> list[str]:
    from calib.estimators import CodebookEstimator, IdentityEstimator, Outliers, UniformEstimator

    around = location[:-1]
    if "outliers" in around:
        return list(Outliers.model_fields)
    for kind in (CodebookEstimator, IdentityEstimator, UniformEstimator):
        if kind.model_fields["method"].default in around:
            return list(kind.model_fields)
    return list(Recipe.model_fields)
