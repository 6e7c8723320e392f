"""Exact weighted k-means on a line, for many histograms at once.

Optimal clusters of sorted points are intervals, so the optimum is a shortest path over bins:
``D[k][j] = min_i D[k-1][i] + cost(i, j)``, where ``cost(i, j)`` is the squared error of bins ``i..j-1`` around their
mean, read off prefix sums in O(1). The best ``i`` never decreases with ``j``, hence a divide and conquer in
O(k n log n). Lloyd iterations, in contrast, can stop at a local optimum.

A level may serve no bin, so ``D[k]`` is the best of *at most* k levels. Costs are computed in units of total weight
times squared range, where rounding is about 1e-15.

References
----------
X. Wu, "Optimal quantization by matrix searching", J. Algorithms 12 (1991): total monotonicity of this cost.
A. Gronlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", arXiv:1701.07204.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from calib.solvers.interval_kernel import solve_distortions, solve_levels
from calib.solvers.threads import in_parts

Solver = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], None]
"""Writes the answers to problems, given as centers and weights."""


def kmeans_1d(
    centers: Float[Tensor, "problems bins"], weights: Float[Tensor, "problems bins"], n_levels: int
) -> Float[Tensor, "problems n_levels"]:
    """Levels, ascending, that minimise ``sum_i w_i (x_i - Q(x_i))^2`` exactly.

    Parameters
    ----------
    centers
        Values ``x``, ascending within a problem; equal neighbours are allowed.
    weights
        Weights ``w >= 0``; bins of weight zero are ignored. Every problem needs a positive sum.
    n_levels
        Number of levels. With fewer distinct values, those are the first levels and the last one repeats.

    Returns
    -------
    Tensor
        Levels in float64, on the device of `centers`. They are found on the CPU, whatever the device, and depend
        neither on which problems share a call nor on the number of threads.

    Raises
    ------
    ValueError
        If the shapes differ, a value is not finite, centers descend, or a problem has no weight.

    Examples
    --------
    >>> kmeans_1d(torch.tensor([[0.0, 1.0, 9.0, 10.0]]), torch.tensor([[1.0, 3.0, 1.0, 1.0]]), 2)
    tensor([[0.7500, 9.5000]], dtype=torch.float64)
    """
    _check("kmeans_1d", centers, weights, n_levels)
    return _solve(solve_levels, centers, weights, n_levels)


def distortion_by_levels(
    centers: Float[Tensor, "problems bins"], weights: Float[Tensor, "problems bins"], n_levels: int
) -> Float[Tensor, "problems n_levels"]:
    """Least distortion with 1, 2, ..., `n_levels` levels, from one run; never increasing.

    Parameters and errors are those of `kmeans_1d`. The absolute error is about 1e-15 of total weight times squared
    range; where that matters, `distortion` of the levels is exact.
    """
    _check("distortion_by_levels", centers, weights, n_levels)
    return _solve(solve_distortions, centers, weights, n_levels)


def distortion(
    centers: Float[Tensor, "problems bins"],
    weights: Float[Tensor, "problems bins"],
    levels: Float[Tensor, "problems n_levels"],
) -> Float[Tensor, " problems"]:
    """Weighted squared error to the nearest level, ``sum_i w_i (x_i - Q(x_i))^2``, in float64.

    `levels` may come in any order; the other parameters and the errors are those of `kmeans_1d`.
    """
    _check("distortion", centers, weights, levels.shape[-1])
    _require(
        len(levels) == len(centers) and bool(levels.isfinite().all()),
        f"distortion: expected finite levels for {len(centers)} problems; got shape {tuple(levels.shape)}, "
        f"{int((~levels.isfinite()).sum())} values not finite; pass what kmeans_1d returned for these centers.",
    )
    values, ordered = centers.double(), levels.double().sort(-1).values
    edges = (ordered[:, 1:] + ordered[:, :-1]) / 2
    nearest = ordered.gather(-1, torch.searchsorted(edges, values.contiguous()))
    return (weights.double() * (values - nearest).square()).sum(-1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(who: str, centers: Tensor, weights: Tensor, n_levels: int) -> None:
    """Refuse what has no answer, naming the count of offenders."""
    _require(
        centers.shape == weights.shape and centers.ndim == 2 and centers.numel() > 0,
        f"{who}: expected centers and weights of one shape (problems, bins), not empty; "
        f"got {tuple(centers.shape)} and {tuple(weights.shape)}; use x[None] for a single problem.",
    )
    _require(n_levels >= 1, f"{who}: expected at least 1 level; got {n_levels}; pass 2**bits.")
    broken = int((~centers.isfinite() | ~weights.isfinite()).sum())
    _require(broken == 0, f"{who}: expected finite values; got {broken} bins with NaN or Inf; look upstream.")
    negative, descents = int((weights < 0).sum()), int((centers.diff(dim=-1) < 0).sum())
    _require(negative == 0, f"{who}: expected weights >= 0; got {negative} negative; look upstream.")
    _require(descents == 0, f"{who}: expected ascending centers; got {descents} descents; sort both.")
    idle = (weights.double().sum(-1) == 0).nonzero()[:, 0].tolist()
    _require(not idle, f"{who}: expected a positive total weight; got zero in problems {idle[:8]}; drop them.")


def _solve(solver: Solver, centers: Tensor, weights: Tensor, n_levels: int) -> Tensor:
    values, masses = (part.double().cpu().contiguous().numpy() for part in (centers, weights))
    found = np.empty((len(values), n_levels))
    in_parts(lambda part: solver(values[part], masses[part], found[part]), len(values))
    return torch.from_numpy(found).to(centers.device)
