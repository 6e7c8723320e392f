"""The levels of a codebook as it stores them, with boundaries where codes are not the nearest levels."""

from typing import Any, Literal

import torch
from jaxtyping import Float16, Float64
from torch import Tensor

from calib.estimators.fixed_levels import fixed_levels
from calib.estimators.normal_values import Histogram
from calib.solvers.kmeans import kmeans_1d

FixedLevels = Literal["normal_float", "gaussian", "laplace"]
Levels = Literal["fitted", "normal_float", "gaussian", "laplace"]


def fixed(table: FixedLevels, n_levels: int) -> Float16[Tensor, "1 levels"]:
    """A table that needs no data."""
    return fixed_levels(table, n_levels).half()[None]


def fitted(histogram: Histogram, n_levels: int, qnorm: bool) -> dict[str, Any]:
    """Levels by exact k-means, one table for each histogram; with Q-Norm, boundaries too.

    Parameters
    ----------
    histogram : pair of Float64[Tensor, "tables bins"]
        Centres and weights.
    n_levels : int
        Levels of each table.
    qnorm : bool
        Decoded values get the mean and the deviation of what they stand for, while codes stay those of the nearest
        fitted levels.
    """
    levels = kmeans_1d(*histogram, n_levels).cpu().half()
    if not qnorm:
        return {"levels": levels}
    wide = levels.double()
    boundaries = (wide[:, 1:] + wide[:, :-1]) / 2
    centers, weights = (part.cpu() for part in histogram)
    decoded = wide.gather(1, torch.searchsorted(boundaries, centers))
    (mean, deviation), (own_mean, own_deviation) = _spread(centers, weights), _spread(decoded, weights)
    gain = torch.where(own_deviation > 0, deviation / own_deviation, 1.0)
    return {"levels": ((wide - own_mean) * gain + mean).half(), "boundaries": boundaries.float()}


def _spread(x: Float64[Tensor, "tables bins"], weights: Float64[Tensor, "tables bins"]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each table's values, "tables 1"."""
    share = weights / weights.sum(dim=1, keepdim=True)
    mean = (share * x).sum(dim=1, keepdim=True)
    return mean, (share * (x - mean).square()).sum(dim=1, keepdim=True).sqrt()
