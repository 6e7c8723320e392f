"""Time of fitting codebooks from statistics, against scikit-learn's k-means on the values themselves.

Run on an idle machine, from the checkout: ``python -m scripts.bench_fit``. Whole models take minutes each; `--recipes`
chooses among them, `--layers` makes them smaller.
"""

import argparse
import resource

import torch
from jaxtyping import Float32
from sklearn.cluster import KMeans
from torch import Tensor

from artifacts.artifact import Artifact
from artifacts.codebook import Codebook
from artifacts.sites import Site
from calib import fit, load_recipe
from calib.estimators import CodebookEstimator
from calib.statistics.channel_histogram import ChannelHistogram
from calib.statistics.site_statistics import SiteShape, SiteStatistics
from scripts.benchmark import HEADER, hardware, row, seconds
from scripts.synthetic import model_statistics, site_values

LIMITS = {"default": 60.0, "eigen": 300.0, "predictive": 600.0}
"""Seconds that fitting a whole model may take."""

LARGEST_BYTES = 12 * 2**30
"""Memory that a fit may take, statistics included."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("python -m scripts.bench_fit", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens (default: 4096)")
    parser.add_argument("--heads", type=int, default=8, help="KV heads of 128 channels (default: 8)")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (default: 32)")
    parser.add_argument(
        "--recipes", nargs="+", choices=LIMITS, default=list(LIMITS), help="of whole models (default: all)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="sites fitted at a time (default: 2)")
    args = parser.parse_args(argv)
    print(hardware(), HEADER, sep="\n")
    for line in compare_with_sklearn(args.tokens, args.heads):
        print(line, flush=True)
    for recipe in args.recipes:
        for line in fit_model(recipe, (args.tokens, args.heads, args.layers, args.jobs)):
            print(line, flush=True)
    return 0


def compare_with_sklearn(tokens: int, heads: int) -> list[str]:
    """Rows for one 16-level codebook shared by all channels of a site: time, without and with the histogram, and error.

    Both minimise the unweighted error of the same values, each channel normalised to [-1, 1]. Scikit-learn is called as
    KVQuant calls it, and given the normalised values; normalising them is not counted.
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
    values = ((x - quantizer.offset) / quantizer.scale).reshape(-1, 1)
    rival = KMeans(n_clusters=16, n_init="auto", max_iter=50, random_state=0)
    baseline = seconds(lambda: rival.fit(values.numpy()), repeats=2)
    ours, both = (seconds(call, repeats=5) for call in (lambda: estimator.fit(statistics), accumulate_and_fit))
    errors = [squared_error(values, levels) for levels in (quantizer.levels, torch.from_numpy(rival.cluster_centers_))]
    what = f"16 levels for {values.numel() / 1e6:.3g} M values"
    return [
        row(f"{what}, from statistics / sklearn", ours, baseline, at_least=100),
        row(f"{what}, with their histogram / sklearn", both, baseline, at_least=30),
        row(f"{what}, mean squared error / sklearn", *errors, at_most=1, unit=""),
    ]


def fit_model(name: str, size: tuple[int, int, int, int]) -> list[str]:
    """Rows for all key and value sites of a model with a shipped recipe, against what it may take.

    Peak memory is that of the whole process so far: a limit that is kept is kept by each recipe.
    """
    tokens, heads, layers, jobs = size
    recipe = load_recipe(name)
    statistics = model_statistics(tokens, heads, layers, tier="full" if recipe.needs_full else "basic")
    found = list[Artifact]()
    ours = seconds(lambda: found.append(fit(statistics, recipe, jobs=jobs)), repeats=1)
    what = f"{len(found[0])} sites of {heads * 128} channels, recipe {name}"
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        row(f"{what} / limit", ours, LIMITS[name], at_most=1),
        row(f"{what}, peak memory / limit", peak / 2**30, LARGEST_BYTES / 2**30, at_most=1, unit="GiB"),
    ]


def squared_error(values: Float32[Tensor, "values 1"], levels: Tensor) -> float:
    """Mean squared distance to the nearest level, in float64."""
    ordered = levels.double().flatten().sort().values
    x = values.double().flatten()
    nearest = ordered[torch.searchsorted((ordered[1:] + ordered[:-1]) / 2, x)]
    return float((x - nearest).square().mean())


if __name__ == "__main__":
    raise SystemExit(main())
