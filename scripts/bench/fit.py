"""Time of fitting codebooks from statistics, against scikit-learn's k-means on the values themselves.

Run on an idle machine, from the checkout: ``python -m scripts.bench.fit``. Whole models are fitted twice, alone and
beside a process that keeps a core busy, and take minutes; `--models` and `--recipes` select some, `--layers` shrinks
them.
"""

import argparse
import os
import resource
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from jaxtyping import Float32
from torch import Tensor

from artifacts.artifact import Artifact
from artifacts.quantizers.codebook import Codebook
from artifacts.sites import Site
from calib import fit, load_recipe
from calib.estimators import CodebookEstimator
from calib.solvers.lloyd import kmeans_lloyd
from calib.statistics.channel_histogram import ChannelHistogram
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics, Tier
from scripts.bench.ratio import Measured, add_json_option, company_row, report, seconds
from scripts.bench.synthetic import model_statistics, site_values

MODELS = {"SmolLM2-135M": (30, 3, 64), "Llama-3-8B": (32, 8, 128)}
"""Layers, KV heads and channels of a head."""

LIMITS = {
    "SmolLM2-135M": {"default": 1.0, "eigen": 4.0, "predictive-entropy": 60.0},
    "Llama-3-8B": {"default": 8.0, "eigen": 60.0, "predictive": 150.0, "predictive-entropy": 480.0},
}
"""Limit in seconds of fitting a whole model on two cores."""

FIRST_FIT_SECONDS = 2.0
"""Limit of what compilation adds to the first fit of a process, with compiled code on disk from an earlier one."""

LARGEST_BYTES = 12 * 2**30
"""Limit of the memory of a fit, statistics included."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    recipes = sorted({recipe for limits in LIMITS.values() for recipe in limits})
    parser = argparse.ArgumentParser("python -m scripts.bench.fit", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens (default: 4096)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose shapes (default: all)")
    parser.add_argument("--heads", type=int, help="KV heads (default: the model's)")
    parser.add_argument("--layers", type=int, help="layers (default: the model's)")
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes, help="of models (default: all)")
    parser.add_argument("--jobs", type=int, help="sites fitted at a time (default: the cores)")
    add_json_option(parser)
    args = parser.parse_args(argv)
    what = (f"shapes of {' and '.join(args.models)}", f"{args.tokens} synthetic tokens")
    report(compare(args), args.json, "fit", argv, what)
    return 0


def compare(args: argparse.Namespace) -> Iterator[Measured]:
    """All rows that are asked for."""
    yield from compare_with_sklearn(args.tokens, args.heads or 8)
    yield from compare_first_fits()
    for model, (layers, heads, head_dim) in ((name, MODELS[name]) for name in args.models):
        shape = (args.layers or layers, args.heads or heads, head_dim)
        for recipe in (name for name in LIMITS[model] if name in args.recipes):
            yield from fit_model(recipe, LIMITS[model][recipe], args.tokens, shape, args.jobs)


def compare_first_fits() -> list[Measured]:
    """Rows for the extra time of a process's first fit over the second, without and with compiled code on disk.

    The fit is a tiny one of the recipe that needs most of the compiled functions.
    """
    # An empty cache folder of numba makes the first process compile, the second one load what it left.
    with tempfile.TemporaryDirectory() as folder:
        before, os.environ["NUMBA_CACHE_DIR"] = os.environ.get("NUMBA_CACHE_DIR"), folder
        try:
            cold, warm = seconds_more_at_first(), seconds_more_at_first()
        finally:
            del os.environ["NUMBA_CACHE_DIR"]
            os.environ |= {} if before is None else {"NUMBA_CACHE_DIR": before}
    return [
        Measured("compiling at the first fit, nothing on disk", cold, FIRST_FIT_SECONDS),
        Measured("compiling at the first fit, kept on disk / limit", warm, FIRST_FIT_SECONDS, at_most=1),
    ]


def seconds_more_at_first() -> float:
    """Seconds that the first fit takes longer than the second, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_first_less_second).result()


def _first_less_second() -> float:
    statistics, recipe = model_statistics(64, heads=1, layers=2, tier="full"), load_recipe("predictive-entropy")
    eigen = load_recipe("eigen")
    first, second = (
        seconds(lambda: (fit(statistics, recipe, jobs=1), fit(statistics, eigen, jobs=1)), repeats=1) for _ in range(2)
    )
    return first - second


def compare_with_sklearn(tokens: int, heads: int) -> list[Measured]:
    """Rows for one 16-level codebook shared by all channels of a site: time, without and with the histogram, and error.

    Both minimise the unweighted error of the same values, each channel normalised to [-1, 1]. Scikit-learn is called as
    KVQuant calls it, on the normalised values; the time of normalisation is left out.
    """
    x = site_values(tokens, heads * 128, seed=0)
    statistics = SiteStatistics(SiteShape(site=Site(0, "key", "pre_rope"), heads=heads, head_dim=128), "basic")
    statistics.update(x)
    estimator = CodebookEstimator(bits=4, tables="site", weights="none")

    def accumulate_and_fit() -> None:
        ChannelHistogram(x.shape[1]).update(x)
        estimator.fit(statistics)

    quantizer = estimator.fit(statistics).quantizer
    assert isinstance(quantizer, Codebook)
    values = ((x - quantizer.offset) / quantizer.scale).reshape(1, -1)
    rival, ones = list[Tensor](), torch.ones_like(values)
    baseline = seconds(lambda: rival.append(kmeans_lloyd(values, ones, 16)), repeats=2)
    ours, both = (seconds(call, repeats=5) for call in (lambda: estimator.fit(statistics), accumulate_and_fit))
    errors = [squared_error(values, levels) for levels in (quantizer.levels, rival[0])]
    what = f"16 levels for {values.numel() / 1e6:.3g} M values"
    return [
        Measured(f"{what}, from statistics / sklearn", ours, baseline, at_least=100),
        Measured(f"{what}, with their histogram / sklearn", both, baseline, at_least=30),
        Measured(f"{what}, mean squared error / sklearn", errors[0], errors[1], at_most=1, unit=""),
    ]


def fit_model(name: str, limit: float, tokens: int, shape: tuple[int, int, int], jobs: int | None) -> list[Measured]:
    """Rows for all key and value sites of a model with a shipped recipe: against its limit, and beside a busy process.

    Peak memory is that of the whole process so far, so that a limit that holds, holds for each recipe.
    """
    recipe, (layers, heads, head_dim) = load_recipe(name), shape
    tier: Tier = "full" if recipe.needs_full else "basic"
    statistics = model_statistics(tokens, heads, layers, tier=tier, head_dim=head_dim)
    found = list[Artifact]()
    idle = seconds(lambda: found.append(fit(statistics, recipe, jobs=jobs)), repeats=1)
    what = f"{len(found.pop())} sites of {heads * head_dim} channels, recipe {name}"
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        Measured(f"{what} / limit", idle, limit, at_most=1),
        Measured(f"{what}, peak memory / limit", peak / 2**30, LARGEST_BYTES / 2**30, at_most=1, unit="GiB"),
        company_row(what, lambda: fit(statistics, recipe, jobs=jobs), idle),
    ]


def squared_error(values: Float32[Tensor, "1 values"], levels: Tensor) -> float:
    """Mean squared distance to the nearest level, in float64."""
    ordered = levels.double().flatten().sort().values
    x = values.double().flatten()
    # The nearest of sorted levels is the cell between their midpoints.
    nearest = ordered[torch.searchsorted((ordered[1:] + ordered[:-1]) / 2, x)]
    return float((x - nearest).square().mean())


if __name__ == "__main__":
    raise SystemExit(main())
