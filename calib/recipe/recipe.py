"""Recipes: estimators for the keys and values of each layer, the stage of keys, and the cache policy."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, final

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from artifacts.errors import InvalidValueError
from artifacts.sites import Stage
from calib.estimators import AnyEstimator, Estimator
from calib.recipe.errors import Marks, RecipeError, mark, recipe_error
from calib.recipe.modelslim import from_modelslim, is_modelslim
from calib.recipe.override import CachedTensor, Override, merged
from calib.recipe.patterns import Patterns
from calib.recipe.recipe_file import Document, read_document, shipped_recipes

__all__ = ["Recipe", "RecipeError", "load_recipe", "shipped_recipes"]

_ENTRY: TypeAdapter[Estimator] = TypeAdapter(AnyEstimator)

_OVERRIDES = TypeAdapter(dict[Literal["overrides"], list[dict[CachedTensor, AnyEstimator]]])


class _Window(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    residual_tokens: int = Field(default=0, ge=0)
    block_tokens: int = Field(default=1, ge=1)


@final
class CacheEntry(_Window):
    """Cache policy of a method: the fields of `simquant.CachePolicy`, which explains them.

    The protocols `decode` and `cache` apply it, and so does a packed cache without an explicit policy; `full`, which
    has no residual window, does not.

    Parameters
    ----------
    residual_tokens, block_tokens : int
        Recent tokens kept in full precision, and tokens quantized at a time: a multiple of the quantizers' group.
    values : window or None
        Window of the values, if it differs from that of the keys.
    exact_prefill : bool
        True if attention during prefill reads keys and values in full precision.
    keep_smallest_norm : int
        Number of tokens with the smallest key norms so far that are kept in full precision.
    """

    values: _Window | None = None
    exact_prefill: bool = False
    keep_smallest_norm: int = Field(default=0, ge=0)


def _file_name(name: str) -> str:
    if not name.strip(". ") or not name.isprintable() or {"/", "\\"} & set(name):
        raise InvalidValueError(f"expected a file name without / and \\; got {name!r:.80}")
    return name


@final
class Recipe(BaseModel):
    """Estimators and settings for quantizing the cache of a model.

    Parameters
    ----------
    name : str
        Name for files and tables; defaults to the name of the recipe file.
    source : str
        Method that the recipe reproduces, with its paper.
    stage : {'pre_rope', 'post_rope'}
        Keys before or after RoPE.
    key, value : estimator
        Hyper-parameters of the estimators for all layers.
    sink_tokens : int or 'auto'
        First positions of a sequence that are kept in full precision and left out of the fit, 0 to 8; `auto` takes the
        number with the least weighted error per counted bit, see `calib.fitting.sinks`.
    target_bits : float or None
        Mean bits over all keys and values, allocated to the sites, for the methods `mixed_codebook` and
        `entropy_coded`; None uses the bits of each site.
    cache : CacheEntry or None
        Other tokens that a cache keeps in full precision, if the method has any.
    include, exclude : tuple of str
        Globs over paths of attention modules, layers and sites: a site is quantized if `include` matches it and
        `exclude` does not.
    overrides : tuple of Override
        Changes for some layers; a later one wins over an earlier one.

    Examples
    --------
    More bits in the first and the last layer; a file has the same entries after `extends: kvquant`.

    >>> ends = {"layers": [0, -1], "key": {"bits": 8}, "value": {"bits": 8}}
    >>> recipe = load_recipe("kvquant").edited({"overrides": [ends]})
    >>> recipe.estimator("key").bits, recipe.estimator("key", recipe.overrides).bits
    (4, 8)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file_entries: ClassVar[tuple[str, ...]] = ("extends",)
    """Entries of a recipe file besides the fields."""

    name: Annotated[str, AfterValidator(_file_name)]
    source: str = ""
    stage: Stage = "pre_rope"
    key: AnyEstimator
    value: AnyEstimator
    sink_tokens: Annotated[int, Field(ge=0, le=8)] | Literal["auto"] = 0
    target_bits: float | None = Field(default=None, gt=0, le=8)
    cache: CacheEntry | None = None
    include: Annotated[Patterns, Field(min_length=1)] = ("*",)
    exclude: Patterns = ()
    overrides: tuple[Override, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        """Validates overrides together with the entries that they change, and the methods for target_bits."""
        # Through JSON, as for a file: strict validation then accepts lists for tuples and nothing else.
        entries = [{tensor: self._entry(tensor, [one]) for tensor in one.tensors} for one in self.overrides]
        _OVERRIDES.validate_json(json.dumps({"overrides": entries}), strict=True)
        for tensor in ("key", "value"):
            if self.target_bits is not None and getattr(self, tensor).allowance is None:
                raise InvalidValueError(
                    f"target_bits allocates bits; {tensor} needs an entry with method: mixed_codebook or entropy_coded"
                )
        return self

    def estimator(self, tensor: CachedTensor, overrides: Iterable[Override] = ()) -> Estimator:
        """Estimator for keys or values, with overrides applied in order.

        Raises
        ------
        RecipeError
            If the overrides contradict each other.
        """
        try:
            return _ENTRY.validate_json(json.dumps(self._entry(tensor, overrides)), strict=True)
        except ValidationError as error:
            raise recipe_error(error, AnyEstimator, f"{self.name}: overrides of {tensor} together", {}) from error

    @property
    def needs_fisher(self) -> bool:
        """True if the estimator of any site needs squared gradients."""
        entries = [self.estimator(tensor, [one]) for one in self.overrides for tensor in one.tensors]
        return any(entry.needs_fisher for entry in (self.key, self.value, *entries))

    @property
    def needs_full(self) -> bool:
        """True if the estimator of any site needs statistics of the tier `full`."""
        entries = [self.estimator(tensor, [one]) for one in self.overrides for tensor in one.tensors]
        return any(entry.needs_full for entry in (self.key, self.value, *entries))

    def edited(self, changes: Mapping[str, Any]) -> "Recipe":
        """Recipe with some entries changed, such as `{"key": {"bits": 3}}`, and validated again.

        The change `{"key": {"method": "identity"}}` applies to all layers, whatever overrides say.

        Raises
        ------
        RecipeError
            If the result is not valid.
        """
        exact = [name for name in ("key", "value") if changes.get(name) == {"method": "identity"}]
        base = self.model_dump(mode="json")
        rows = [{**one, **dict.fromkeys(exact)} for one in base["overrides"]]
        base["overrides"] = [one for one in rows if one["key"] is not None or one["value"] is not None]
        return self.parse(merged(base, changes), self.name)

    def to_yaml(self) -> str:
        """Text of the recipe as a recipe file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def parse(cls, data: object, where: str, marks: Marks | None = None) -> "Recipe":
        """Recipe from plain values; `where` and `marks` give their file and lines.

        Raises
        ------
        RecipeError
            Names every invalid entry, the expected value, and the nearest known name.
        """
        marks = marks or {}
        if not isinstance(data, dict):
            got = {type(None): "an empty file", list: "a list"}.get(type(data), f"{data!r:.80}")
            raise RecipeError(
                f"recipe {mark((), where, marks)}: expected entries such as key: {{method: uniform}}; got {got}; "
                "start from `calibrate --print-recipe`"
            )
        try:
            return cls.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise recipe_error(error, cls, where, marks) from error
        except (TypeError, ValueError) as error:  # types or references that JSON does not have
            raise RecipeError(f"recipe {where}: expected numbers, texts, lists and entries; {error}") from error

    def _entry(self, tensor: CachedTensor, overrides: Iterable[Override]) -> dict[str, Any]:
        entry: dict[str, Any] = getattr(self, tensor).model_dump(mode="json")
        for override in overrides:
            entry = override.applied(tensor, entry)
        return entry


def chosen_recipe(recipe: str | Path | Recipe, bits: int | None = None) -> Recipe:
    """Recipe by name, with another code width for keys and values if `bits` is given; 16 is full precision.

    Raises
    ------
    RecipeError
        If there is no such recipe, or it does not support these bits.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if bits is None:
        return chosen
    change = {"method": "identity"} if bits == 16 else {"bits": bits}
    return chosen.edited({"key": change, "value": change})


def load_recipe(name: str | Path) -> Recipe:
    """Shipped recipe by name, or recipe from a `.yaml` file of kvgauge or msModelSlim.

    Parameters
    ----------
    name : str or Path
        One of `shipped_recipes()`, or a file.

    Returns
    -------
    Recipe
        Input of `fit`, possibly after `edited`.

    Raises
    ------
    RecipeError
        If there is no such recipe or file, or it is not valid; with file and line.
    """
    return _load(read_document(str(name)), ())


def _load(document: Document, heirs: tuple[str, ...]) -> Recipe:
    """Recipe of a document; `heirs` are the documents that extend it, outermost first."""
    if is_modelslim(document.data):
        document = from_modelslim(document)
    data = document.data
    if isinstance(data, dict):
        data = {"name": Path(document.where).stem, **data}
        base = _base(document, data.pop("extends"), (*heirs, document.where)) if "extends" in data else {}
        data = merged(base, data)
    return Recipe.parse(data, document.where, document.marks)


def _base(document: Document, extends: object, heirs: tuple[str, ...]) -> dict[str, Any]:
    """Entries of the recipe that a document extends (shipped, or a file beside it), without name and source."""
    place = f"recipe {mark(('extends',), document.where, document.marks)}: extends"
    if not isinstance(extends, str):
        raise RecipeError(f"{place}: expected the name of a recipe or a file; got {extends!r:.80}")
    name = extends if extends in shipped_recipes() else str(Path(document.where).parent / extends)
    if _identity(name) in map(_identity, heirs):
        raise RecipeError(f"{place}: circular: {' extends '.join((*heirs, name))}; extend another recipe")
    try:
        base = read_document(name)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error
    return _load(base, heirs).model_dump(mode="json", exclude={"name", "source"})


def _identity(name: str) -> str:
    return name if name in shipped_recipes() else str(Path(name).resolve())
