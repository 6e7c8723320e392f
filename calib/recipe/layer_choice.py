"""Assignment of estimators to the sites of a model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.sites import Site
from calib.estimators import Estimator, IdentityEstimator
from calib.recipe.errors import RecipeError
from calib.recipe.override import CachedTensor, Override
from calib.recipe.patterns import matched
from calib.recipe.recipe import Recipe
from calib.statistics.site_shape import SiteShape


def resolve(recipe: Recipe, shapes: Sequence[SiteShape]) -> dict[Site, Estimator]:
    """Estimator of each cached site, in the order of the shapes.

    Sites that are not included, or excluded, are kept in full precision.

    Parameters
    ----------
    recipe : Recipe
        Recipe with patterns and overrides.
    shapes : Sequence[SiteShape]
        Sites of all layers of the model; queries are ignored.

    Raises
    ------
    RecipeError
        If a pattern or a number matches no site, overrides contradict each other, or no site is left to quantize.
    """
    where = f"recipe {recipe.name}"
    cached = [shape for shape in shapes if shape.site.tensor != "query"]
    chosen = matched(recipe.include, cached, f"{where}: include")
    chosen -= matched(recipe.exclude, cached, f"{where}: exclude")
    if cached and not chosen:
        raise RecipeError(f"{where}: exclude removes every site that include matches; remove a pattern from exclude")
    overridden = [
        (override, _sites(override, cached, f"{where}: overrides.{number}"))
        for number, override in enumerate(recipe.overrides)
    ]
    found: dict[Site, Estimator] = {}
    for site in (shape.site for shape in cached):
        overrides = [override for override, sites in overridden if site in sites]
        found[site] = recipe.estimator(_tensor(site), overrides) if site in chosen else IdentityEstimator()
    return found


def check(recipe: Recipe, shapes: Sequence[SiteShape]) -> dict[Site, Estimator]:
    """Estimators of `resolve`, each checked against the shape of its site.

    Raises
    ------
    RecipeError
        If an estimator does not suit a shape, with site and reason; and as `resolve`.
    """
    estimators = resolve(recipe, shapes)
    for shape in (shape for shape in shapes if shape.site in estimators):
        # Layers of one shape become one key of the cache of `_check`.
        alike = replace(shape, site=replace(shape.site, layer=0), module="")
        try:
            trial = _check(estimators[shape.site], alike)
            if recipe.sink_tokens == "auto" and not trial.is_causal:
                raise InvalidValueError(
                    f"sink_tokens: auto judges first tokens one by one, but {trial.spec.describe()} has scales that "
                    "tokens share; give a number from 0 to 8"
                )
        except ValueError as error:
            reason = str(error).removeprefix(f"{alike.site}: ")
            raise RecipeError(f"recipe {recipe.name}: {shape.site}: {reason}") from error
    return estimators


@lru_cache
def _check(estimator: Estimator, shape: SiteShape) -> Quantizer:
    """Checks an estimator once for all sites of one shape; cached, as it takes as long as a small fit."""
    return estimator.check(shape)


def _sites(override: Override, cached: Sequence[SiteShape], where: str) -> set[Site]:
    if override.sites is not None:
        sites = matched(override.sites, cached, f"{where}.sites")
    else:
        layers = _layers(override.layers or (), max(shape.site.layer for shape in cached) + 1, where)
        sites = {shape.site for shape in cached if shape.site.layer in layers}
    for tensor in override.tensors:
        if not any(site.tensor == tensor for site in sites):
            raise RecipeError(
                f"{where}: {', '.join(override.sites or ())} matches no {tensor}s, which the override changes"
            )
    return {site for site in sites if site.tensor in override.tensors}


def _layers(numbers: Sequence[int], n_layers: int, where: str) -> set[int]:
    for number in numbers:
        if not -n_layers <= number < n_layers:
            near = n_layers - 1 if number > 0 else -n_layers
            raise RecipeError(
                f"{where}.layers: expected layers 0 to {n_layers - 1}, or -1 to {-n_layers} from the last; "
                f"got {number}; use {near}"
            )
    return {number % n_layers for number in numbers}


def _tensor(site: Site) -> CachedTensor:
    return "key" if site.tensor == "key" else "value"
