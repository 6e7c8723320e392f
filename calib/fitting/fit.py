"""Fit of an artifact from statistics, without the model."""

from collections.abc import Mapping

import torch
from joblib import Parallel, delayed

from artifacts.artifact import Artifact
from artifacts.manifest import Manifest, tool_version
from artifacts.sites import Site
from calib.estimators import Estimator, Fit
from calib.fitting.budget import fit_budget
from calib.fitting.chain import Chain, Progress
from calib.recipe.errors import RecipeError
from calib.recipe.layer_choice import check
from calib.recipe.recipe import Recipe, chosen_recipe
from calib.solvers.threads import torch_threads
from calib.statistics.model_statistics import ModelStatistics

__all__ = ["Progress", "cached_sites", "fit"]

_WIDE_CHANNELS = 512
"""Channels from which the linear algebra of one site runs in several threads.

With 192 channels two threads save an eighth on an idle machine, and take over three times as long beside a busy
process, where each operation waits for both.
"""


def fit(
    statistics: ModelStatistics,
    recipe: str | Recipe = "default",
    *,
    bits: int | None = None,
    jobs: int | None = None,
    progress: Progress = iter,
) -> Artifact:
    """Fits quantizers for all cached sites from calibration statistics, without the model.

    Parameters
    ----------
    statistics : ModelStatistics
        Statistics of the model, of any number of merged shards.
    recipe : str or Recipe
        Name of a shipped recipe, a recipe file, or a recipe.
    bits : int or None
        Code width for keys and values; None leaves it to the recipe.
    jobs : int or None
        Number of sites fitted in parallel, one thread each (an active joblib backend takes precedence). Sites that are
        predicted from one another or have a common bit budget are fitted in sequence; then it is the number of threads
        of a wide site. None takes as many as torch.
    progress : callable
        Wraps the sites, for a progress bar.

    Returns
    -------
    Artifact
        Fitted quantizers, for `artifacts.save` and `simquant.simulate`.

    Raises
    ------
    RecipeError
        If the recipe cannot be read, does not suit the model's shape, or needs keys of another stage.
    MismatchError
        If the statistics lack a site or a statistic that the recipe needs.
    """
    recipe = chosen_recipe(recipe, bits)
    estimators = check(recipe, [statistics.sites[site].shape for site in cached_sites(statistics, recipe)])
    threads = torch.get_num_threads() if jobs is None else jobs
    found = _fits(statistics, recipe, estimators, (threads, progress))
    quantizers = {site: fit.quantizer for site, fit in found.items()}
    first = "" if statistics.has_all_first_positions else "; first positions from a sample of the windows"
    manifest = Manifest(
        specs={site: quantizer.spec for site, quantizer in quantizers.items()},
        model=statistics.origin.model,
        model_id=statistics.origin.model_id,
        corpus=statistics.corpus,
        recipe=recipe.model_dump(mode="json"),
        sink_tokens=recipe.sink_tokens,
        fit_sources={str(site): fit.source + first for site, fit in found.items()},
        tool_version=tool_version(),
    )
    return Artifact(quantizers, manifest, statistics.ngrams)


def cached_sites(statistics: ModelStatistics, recipe: Recipe) -> list[Site]:
    """Sites of keys and values, in the order in which a cache fills.

    Raises
    ------
    RecipeError
        If keys were captured at another stage than the recipe's.
    """
    cached = [site for site in statistics.sites if site.tensor != "query"]
    wrong = [site for site in cached if site.tensor == "key" and site.stage != recipe.stage]
    if wrong:
        raise RecipeError(
            f"fit: recipe {recipe.name} needs keys {recipe.stage}; the statistics have {wrong[0]}. "
            f"Calibrate again with --stage {recipe.stage}, or use a recipe with stage: {wrong[0].stage}."
        )
    return cached


def _fits(
    statistics: ModelStatistics, recipe: Recipe, estimators: Mapping[Site, Estimator], how: tuple[int, Progress]
) -> dict[Site, Fit]:
    jobs, progress = how
    # Independent sites run in parallel. A chain is sequential: a predictor is fitted to dequantized earlier sites.
    is_chain = any(estimator.sources(site, estimators) for site, estimator in estimators.items())
    if recipe.target_bits is None and not is_chain:
        with torch_threads(1):
            fits = Parallel(n_jobs=jobs, prefer="threads", return_as="generator")(
                delayed(_fit_site)(statistics, estimator, site, recipe.sink_tokens)
                for site, estimator in estimators.items()
            )
            return _without_errors(dict(zip(estimators, progress(fits), strict=True)))
    widest = max(statistics.sites[site].shape.channels for site in estimators)
    # Threads inside an operation pay only for wide matrices, see _WIDE_CHANNELS.
    with torch_threads(jobs if widest >= _WIDE_CHANNELS else 1):
        chain = Chain(statistics, recipe.sink_tokens)
        if recipe.target_bits is None:
            return chain.fit(estimators, progress)
        return fit_budget(chain, estimators, recipe.target_bits, progress)


def _fit_site(statistics: ModelStatistics, estimator: Estimator, site: Site, sink_tokens: int) -> Fit | Exception:
    try:
        return estimator.fit(statistics.site(site, sink_tokens)).kept()
    except Exception as error:
        return error


def _without_errors(found: Mapping[Site, Fit | Exception]) -> dict[Site, Fit]:
    # An error is raised when all sites are done. Raised at once, it could end the process while threads still run, and
    # the C++ runtime then aborted it (status 134) behind the message.
    fits: dict[Site, Fit] = {}
    for site, fit in found.items():
        if isinstance(fit, Exception):
            raise fit
        fits[site] = fit
    return fits
