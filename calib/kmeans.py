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

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from calib.partition import at, cost, optimal_bounds, programme_rows

# Bins per batch of problems. One stage then holds a few arrays of some 2 * 13 * 2**17 doubles: bounded.
_BATCH_BINS = 2**17
_TINY = torch.finfo(torch.float64).tiny


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
        Levels in float64, on the device of `centers`. They are found on the CPU, whatever the device: many steps, each
        short. They do not depend on which problems share a call.

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
    return _in_batches(_levels, centers, weights, n_levels)


def distortion_by_levels(
    centers: Float[Tensor, "problems bins"], weights: Float[Tensor, "problems bins"], n_levels: int
) -> Float[Tensor, "problems n_levels"]:
    """Least distortion with 1, 2, ..., `n_levels` levels, from one run; never increasing.

    Parameters and errors are those of `kmeans_1d`. The absolute error is about 1e-15 of total weight times squared
    range; where that matters, `distortion` of the levels is exact.
    """
    _check("distortion_by_levels", centers, weights, n_levels)
    return _in_batches(_distortions, centers, weights, n_levels)


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


def _in_batches(
    solve: Callable[[Tensor, Tensor, int], Tensor], centers: Tensor, weights: Tensor, n_levels: int
) -> Tensor:
    size = max(1, _BATCH_BINS // centers.shape[-1])
    batches = zip(centers.double().cpu().split(size), weights.double().cpu().split(size), strict=True)
    return torch.cat([solve(x, w, n_levels) for x, w in batches]).to(centers.device)


def _levels(centers: Tensor, weights: Tensor, n_levels: int) -> Tensor:
    """Means of the optimal intervals, or the distinct values themselves where there are no more than levels."""
    values = _occupied(centers, weights)
    prefix, origin, span = _prefix_sums(values, weights)
    bounds = optimal_bounds(prefix, _prefix_sums(-values.flip(-1), weights.flip(-1))[0], n_levels)
    start, stop, last_bin = bounds[:, :-1], bounds[:, 1:], values.shape[-1] - 1
    weight, moment, _ = (at(prefix, stop) - at(prefix, start)).unbind()
    # Kept within the interval's own values: exact where there is one, ascending and finite where there is none.
    lowest = values.gather(-1, start.clamp(max=last_bin))
    highest = values.gather(-1, (stop - 1).clamp(min=0)).maximum(lowest)
    means = (origin + span * (moment / weight.clamp(min=_TINY))).clamp(lowest, highest)
    # Where values are too few for an optimum to need means, level q is the value of rank q, or the last.
    rank = pad((values.diff(dim=-1) > 0).cumsum(-1), (1, 0))
    wanted = torch.arange(n_levels, device=rank.device).expand(len(rank), -1).contiguous()
    distinct = values.gather(-1, torch.searchsorted(rank, wanted).clamp(max=last_bin))
    return torch.where(rank[:, -1:] < n_levels, distinct, means)


def _distortions(centers: Tensor, weights: Tensor, n_levels: int) -> Tensor:
    """Last column of the programme for every number of levels, in the caller's units."""
    prefix, _, span = _prefix_sums(_occupied(centers, weights), weights)
    closing = cost(prefix, prefix[..., -1:])
    best = torch.stack([(row + closing).amin(-1) for row in programme_rows(prefix, n_levels)], -1)
    return best.cummin(-1).values * weights.sum(-1, keepdim=True) * span.square()


def _occupied(centers: Tensor, weights: Tensor) -> Tensor:
    """Centers in which an empty bin repeats its occupied neighbour, so that it adds neither a value nor range."""
    before = centers.masked_fill(weights == 0, -torch.inf).cummax(-1).values
    first = centers.masked_fill(weights == 0, torch.inf).amin(-1, keepdim=True)
    return before.maximum(first)


def _prefix_sums(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ``(w, w u, w u^2)`` before each of ``bins + 1`` positions, and origin and span of u.

    With ``values = origin + span * u``, ``0 <= u <= 1`` and ``sum w = 1``, an offset of the data cancels before it is
    squared, and all three sums ascend. The weights are the steps of their own sum: one that vanishes in it vanishes in
    all three, so an interval without weight has no moment either. The total is read off that sum too, whose order,
    unlike that of ``sum``, is the same in any batch.
    """
    low, span = values[:, :1], values[:, -1:] - values[:, :1]
    span = span.where(span > 0, 1.0)
    u, sums = (values - low) / span, pad(weights.cumsum(-1), (1, 0))
    sums = sums / sums[:, -1:]
    w = sums.diff(dim=-1)
    return torch.stack([sums, *(pad(part.cumsum(-1), (1, 0)) for part in (w * u, w * u.square()))]), low, span
