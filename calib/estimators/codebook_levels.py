"""Levels of codebooks: fitted by k-means or fixed, with decision boundaries for Q-Norm."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float16, Float64
from scipy import stats
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.importers.tables import normal_float
from calib.estimators.normal_values import Histogram
from calib.solvers.kmeans import kmeans_1d

Distribution = Literal["gaussian", "laplace"]

_BINS = 2**14

_TAIL = 1e-9
"""Probability beyond each end of the histogram, at 14 standard deviations of a Laplace distribution."""

FixedLevels = Literal["normal_float", "gaussian", "laplace"]

Levels = Literal["fitted", "normal_float", "gaussian", "laplace"]

Solver = Callable[[Tensor, Tensor, int], Tensor]
"""`kmeans_1d`, or what takes its place."""


@functools.cache
def lloyd_max(distribution: Distribution, n_levels: int) -> Float64[Tensor, " levels"]:
    """Lloyd-Max levels: the least mean squared error for a variable of mean 0 and variance 1 (Max 1960).

    Computed by exact k-means on a fine histogram; the distortion for a Gaussian is 0.3634, 0.1175, 0.03455 and 0.009501
    with 2, 4, 8 and 16 levels.

    Parameters
    ----------
    distribution : {'gaussian', 'laplace'}
        Distribution of the variable.
    n_levels : int
        Number of levels, 1 to 256.
    """
    # A Laplace distribution of scale b has the variance 2 b^2.
    law = stats.norm() if distribution == "gaussian" else stats.laplace(scale=2**-0.5)
    edge = law.isf(_TAIL)
    edges = torch.linspace(-edge, edge, _BINS + 1, dtype=torch.float64)
    weights = torch.from_numpy(law.cdf(edges.numpy())).diff()
    [levels] = kmeans_1d(((edges[1:] + edges[:-1]) / 2)[None], weights[None], n_levels)
    symmetric: Tensor = (levels - levels.flip(0)) / 2  # exactly, whatever the solver rounded
    return symmetric


def fixed_levels(table: Literal["normal_float", "gaussian", "laplace"], n_levels: int) -> Float64[Tensor, " levels"]:
    """Levels of a fixed codebook: NormalFloat on [-1, 1], the others for variance 1.

    Raises
    ------
    ValueError
        If the number of NormalFloat levels is no power of two.
    """
    if table != "normal_float":
        return lloyd_max(table, n_levels)
    bits = (n_levels - 1).bit_length()
    if n_levels != 2**bits:
        raise InvalidValueError(f"NormalFloat has 2^bits levels; got {n_levels}; use {2**bits}, or levels: gaussian")
    return normal_float(bits).double()


def fixed(table: FixedLevels, n_levels: int) -> Float16[Tensor, "1 levels"]:
    """Fixed codebook in float16."""
    return fixed_levels(table, n_levels).half()[None]


def fitted(histogram: Histogram, n_levels: int, qnorm: bool, solver: Solver = kmeans_1d) -> dict[str, Any]:
    """Levels by k-means, one codebook for each histogram; with Q-Norm, decision boundaries too.

    Parameters
    ----------
    histogram : pair of Float64[Tensor, "tables bins"]
        Centres and weights.
    n_levels : int
        Levels of each codebook.
    qnorm : bool
        Give decoded values the mean and deviation of the original ones; codes stay those of the nearest fitted levels.
    solver : callable
        k-means of histograms.
    """
    levels = solver(*histogram, n_levels).cpu().half()
    if not qnorm:
        return {"levels": levels}
    wide = levels.double()
    boundaries = (wide[:, 1:] + wide[:, :-1]) / 2
    centers, weights = (part.cpu() for part in histogram)
    decoded = wide.gather(1, torch.searchsorted(boundaries, centers))
    (mean, deviation), (own_mean, own_deviation) = _spread(centers, weights), _spread(decoded, weights)
    # Q-Norm (arXiv 2401.18079): centroids shrink the deviation to sqrt(1 - D) of the original; level -> (level - m2) *
    # s1 / s2 + m1 restores mean m1 and deviation s1. Boundaries stay those of the fitted levels.
    gain = torch.where(own_deviation > 0, deviation / own_deviation, 1.0)
    return {"levels": ((wide - own_mean) * gain + mean).half(), "boundaries": boundaries.float()}


def _spread(x: Float64[Tensor, "tables bins"], weights: Float64[Tensor, "tables bins"]) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation of each table, "tables 1"."""
    p = weights / weights.sum(dim=1, keepdim=True)
    mean = (p * x).sum(dim=1, keepdim=True)
    return mean, (p * (x - mean).square()).sum(dim=1, keepdim=True).sqrt()
