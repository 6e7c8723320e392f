"""Which estimator each site of a model gets."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from artifacts.sites import Site
from calib.estimators import Estimator, IdentityEstimator
from calib.recipe.errors import RecipeError
from calib.recipe.override import CachedTensor, Override
from calib.recipe.patterns import matched
from calib.recipe.recipe import Recipe
from calib.statistics.site_statistics import SiteShape


def resolve(recipe: Recipe, shapes: Sequence[SiteShape]) -> dict[Site, Estimator]:
    """The estimator for each cached site, in the order of the shapes.

    Sites that are not included, or excluded, stay exact.

    Parameters
    ----------
    recipe : Recipe
        What is asked for.
    shapes : Sequence[SiteShape]
        The sites of all layers of the model; queries are passed over.

    Raises
    ------
    RecipeError
        If a pattern or a number names no site, overrides do not go together, or nothing is left to quantize.
    """
    where = f"recipe {recipe.name}"
    cached = [shape for shape in shapes if shape.site.tensor != "query"]
    chosen = matched(recipe.include, cached, f"{where}: include")
    chosen -= matched(recipe.exclude, cached, f"{where}: exclude")
    if cached and not chosen:
        raise RecipeError(f"{where}: exclude leaves no site of those that include names; drop a pattern")
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
    """The estimators of `resolve`, each of which goes with the shape of its site.

    Raises
    ------
    RecipeError
        If one does not, with the site and the reason; and as `resolve` does.
    """
    estimators = resolve(recipe, shapes)
    for shape in (shape for shape in shapes if shape.site in estimators):
        alike = replace(shape, site=replace(shape.site, layer=0), module="")
        try:
            _check(estimators[shape.site], alike)
        except ValueError as error:
            reason = str(error).removeprefix(f"{alike.site}: ")
            raise RecipeError(f"recipe {recipe.name}: {shape.site}: {reason}") from error
    return estimators


@lru_cache
def _check(estimator: Estimator, shape: SiteShape) -> None:
    """Once for all sites that are alike, before the model runs and again before the fit: it takes as long as a fit."""
    estimator.check(shape)


def _sites(override: Override, cached: Sequence[SiteShape], where: str) -> set[Site]:
    if override.sites is not None:
        sites = matched(override.sites, cached, f"{where}.sites")
    else:
        layers = _layers(override.layers or (), max(shape.site.layer for shape in cached) + 1, where)
        sites = {shape.site for shape in cached if shape.site.layer in layers}
    for tensor in override.tensors:
        if not any(site.tensor == tensor for site in sites):
            raise RecipeError(f"{where}: changes the {tensor}s of {', '.join(override.sites or ())}, which has none")
    return {site for site in sites if site.tensor in override.tensors}


def _layers(numbers: Sequence[int], n_layers: int, where: str) -> set[int]:
    for number in numbers:
        if not -n_layers <= number < n_layers:
            near = n_layers - 1 if number > 0 else -n_layers
            raise RecipeError(
                f"{where}.layers: the model has layers 0 to {n_layers - 1}, or -1 to {-n_layers} from the last; "
                f"got {number}; use {near}"
            )
    return {number % n_layers for number in numbers}


def _tensor(site: Site) -> CachedTensor:
    return "key" if site.tensor == "key" else "value"
