"""Fit of an artifact from statistics, without the model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from joblib import Parallel, delayed

from artifacts.artifact import Artifact
from artifacts.manifest import Manifest, SinkChoice, tool_version
from artifacts.sites import Site
from calib.estimators import Estimator, Fit
from calib.fitting.budget import at_equal_bits, fit_budget
from calib.fitting.chain import Chain, Progress
from calib.fitting.sinks import choose_sinks
from calib.recipe.errors import RecipeError
from calib.recipe.layer_choice import check
from calib.recipe.recipe import Recipe, chosen_recipe
from calib.solvers.threads import torch_threads
from calib.statistics.model_statistics import ModelStatistics
from calib.statistics.site_statistics import FIRST_POSITIONS

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
        Wraps the sites of each fit, for a progress bar; a recipe with `sink_tokens: auto` is fitted twice.

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
    fits = _Fits(statistics, estimators, threads, progress)
    sink_tokens, choice, found = _with_sinks(fits, recipe)
    quantizers = {site: fit.quantizer for site, fit in found.items()}
    first = "" if statistics.has_all_first_positions else "; first positions from a sample of the windows"
    manifest = Manifest(
        specs={site: quantizer.spec for site, quantizer in quantizers.items()},
        model=statistics.origin.model,
        model_id=statistics.origin.model_id,
        corpus=statistics.corpus,
        recipe=recipe.model_dump(mode="json"),
        sink_tokens=sink_tokens,
        sink_choice=choice,
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


@dataclass(frozen=True)
class _Fits:
    """Fits of all sites, for any number of sink tokens."""

    statistics: ModelStatistics
    estimators: Mapping[Site, Estimator]
    jobs: int
    progress: Progress

    def at(self, sink_tokens: int, target_bits: float | None) -> dict[Site, Fit]:
        """Fits without the first `sink_tokens` positions, in parallel where sites are independent."""
        # A chain is sequential: a predictor is fitted to dequantized earlier sites.
        is_chain = any(estimator.sources(site, self.estimators) for site, estimator in self.estimators.items())
        if target_bits is None and not is_chain:
            with torch_threads(1):
                fits = Parallel(n_jobs=self.jobs, prefer="threads", return_as="generator")(
                    delayed(_fit_site)(self.statistics, estimator, site, sink_tokens)
                    for site, estimator in self.estimators.items()
                )
                return _without_errors(dict(zip(self.estimators, self.progress(fits), strict=True)))
        widest = max(self.statistics.sites[site].shape.channels for site in self.estimators)
        # Threads inside an operation pay only for wide matrices, see _WIDE_CHANNELS.
        with torch_threads(self.jobs if widest >= _WIDE_CHANNELS else 1):
            chain = Chain(self.statistics, sink_tokens)
            if target_bits is None:
                return chain.fit(self.estimators, self.progress)
            return fit_budget(chain, self.estimators, target_bits, self.progress)


def _with_sinks(fits: _Fits, recipe: Recipe) -> tuple[int, SinkChoice | None, dict[Site, Fit]]:
    """Number of sink tokens, the reason if it was chosen, and the fits without them."""
    if recipe.sink_tokens != "auto":
        return recipe.sink_tokens, None, fits.at(recipe.sink_tokens, recipe.target_bits)
    if not (fits.statistics.sample.positions >= FIRST_POSITIONS).any():
        choice = SinkChoice(reason=f"0: no window has tokens after the first {FIRST_POSITIONS} to compare them with")
        return 0, choice, fits.at(0, recipe.target_bits)
    # Without the first positions, so that no table is bent towards a sink. Equal bits stand for a budget, which is
    # allocated in up to four rounds.
    trial = fits
    if recipe.target_bits is not None:
        trial = replace(fits, estimators=at_equal_bits(fits.estimators, recipe.target_bits))
    found = trial.at(FIRST_POSITIONS, None)
    number, choice = choose_sinks(fits.statistics, {site: fit.quantizer for site, fit in found.items()})
    if trial is fits and number == FIRST_POSITIONS:
        return number, choice, found
    return number, choice, fits.at(number, recipe.target_bits)


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
