"""Recipes fitted and scored on a model, with the time beside bare forward passes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from jaxtyping import Int64
from torch import Tensor, nn

from artifacts.artifact import Artifact
from calib.calibration import gather
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe
from kvgauge.terminal.console import bar
from scripts.bench.calibrate import forward_passes
from scripts.bench.ratio import seconds
from simquant import EvalResult
from simquant.evaluate import evaluate_each

BATCH_TOKENS = 1024
"""Tokens of short windows that are scored at once."""


@dataclass(frozen=True)
class Measurement:
    """What was found of some recipes.

    Parameters
    ----------
    artifacts, results : mapping
        By name of the recipe.
    gather_ratio : float
        Time of gathering statistics over that of bare forward passes of the same windows.
    evaluate_ratio : float
        Time of an evaluation over that of as many bare forward passes: one in full precision and one for each recipe.
    """

    artifacts: Mapping[str, Artifact]
    results: Mapping[str, EvalResult]
    gather_ratio: float
    evaluate_ratio: float


def measure(
    model: nn.Module,
    calibration: Int64[Tensor, "windows tokens"],
    scored: Int64[Tensor, "windows tokens"],
    recipes: Mapping[str, Recipe],
) -> Measurement:
    """Fits all recipes from one pass over the calibration windows, and scores them on other windows.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    calibration, scored : Int64[Tensor, "windows tokens"]
        Token ids, windows of one length.
    recipes : mapping from str to Recipe
        All take their keys at one stage.
    """
    widest = max(recipes.values(), key=lambda recipe: recipe.needs_full)
    some = scored[: max(1, len(scored) // 4)]
    bare = seconds(forward_passes(model, some), repeats=1) / len(some)
    started = time.perf_counter()
    statistics = gather(model, calibration, widest, progress=partial(bar, what="calibrating"))
    gathered = time.perf_counter()
    artifacts = {name: fit(statistics, recipe) for name, recipe in bar(recipes.items(), "fitting")}
    fitted = time.perf_counter()
    results = evaluate_each(
        model,
        scored,
        [*artifacts.values()],
        batch_size=max(1, BATCH_TOKENS // scored.shape[1]),
        progress=partial(bar, what="scoring"),
    )
    evaluated = time.perf_counter() - fitted
    return Measurement(
        artifacts,
        dict(zip(artifacts, results, strict=True)),
        gather_ratio=(gathered - started) / (bare * len(calibration)),
        evaluate_ratio=evaluated / (bare * len(scored) * (1 + len(artifacts))),
    )
