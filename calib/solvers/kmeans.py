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
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from artifacts.errors import InvalidValueError
from calib.solvers.compiled import compiled
from calib.solvers.threads import in_parts

_TINY = float(np.finfo(np.float64).tiny)

Values = Float64[np.ndarray, " bins"]

Row = Float64[np.ndarray, " positions"]

Prefix = Float64[np.ndarray, "3 positions"]

Problems = Float64[np.ndarray, "problems bins"]

Answers = Float64[np.ndarray, "problems n_levels"]

Solver = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], None]
"""Writes the answers to problems, given as centers and weights."""


# A problem is reduced to its distinct values of positive weight and to `prefix`, sums of (w, w u, w u^2) before each of
# n + 1 positions between them. With value = low + span * u, 0 <= u <= 1 and sum w = 1, an offset of the data cancels
# before it is squared, and all three sums ascend.
@compiled
def solve_levels(centers: Problems, weights: Problems, levels: Answers) -> None:
    """Writes the means of the optimal intervals, or the values themselves where there are no more than levels."""
    n_bins, n_levels = centers.shape[1], levels.shape[1]
    values, prefix = np.empty(n_bins), np.empty((3, n_bins + 1))
    rows, cuts = np.empty((n_levels, n_bins + 1)), np.empty(n_bins + 1, np.int64)
    for problem in range(len(centers)):
        n, low, span, _ = _reduce(centers[problem], weights[problem], values, prefix)
        if n <= n_levels:
            for level in range(n_levels):
                levels[problem, level] = values[min(level, n - 1)]
            continue
        _fill_rows(prefix, n, rows[: n_levels - 1], cuts)
        # Trace the optimal intervals back from the last: each starts where the row of one level less is best extended.
        stop = n
        for level in range(n_levels - 1, -1, -1):
            start = _last_start(prefix, rows[level - 1], stop) if level else 0
            # Kept within the interval's own values: exact where there is one, ascending where there is none.
            first = values[min(start, n - 1)]
            last = max(values[max(stop - 1, 0)], first)
            weight, moment = prefix[0, stop] - prefix[0, start], prefix[1, stop] - prefix[1, start]
            levels[problem, level] = min(max(low + span * (moment / max(weight, _TINY)), first), last)
            stop = start


@compiled
def solve_distortions(centers: Problems, weights: Problems, distortions: Answers) -> None:
    """Writes the least squared errors with 1, 2, ... levels, never increasing, in units of total weight and span."""
    n_bins, n_levels = centers.shape[1], distortions.shape[1]
    values, prefix = np.empty(n_bins), np.empty((3, n_bins + 1))
    rows, cuts = np.empty((n_levels, n_bins + 1)), np.empty(n_bins + 1, np.int64)
    for problem in range(len(centers)):
        n, _, span, total = _reduce(centers[problem], weights[problem], values, prefix)
        _fill_rows(prefix, n, rows[: n_levels - 1], cuts)
        least = _cost(prefix, 0, n)
        for level in range(n_levels):
            if level:
                start = _last_start(prefix, rows[level - 1], n)
                least = min(least, rows[level - 1, start] + _cost(prefix, start, n))
            distortions[problem, level] = least * total * (span * span)


@compiled
def _reduce(centers: Values, weights: Values, values: Values, prefix: Prefix) -> tuple[int, float, float, float]:
    """Writes the distinct values and the prefix sums; returns their number, the minimum, the range, the total weight.

    A weight is taken as the increment of the running sum of weights: one that is lost to rounding there is lost in all
    three sums, so that an interval without weight has no moment either.
    """
    low, high, total = np.inf, -np.inf, 0.0
    for center, weight in zip(centers, weights):  # noqa: B905 - compiled code knows no `strict`
        total += weight
        if weight > 0:
            low, high = min(low, center), max(high, center)
    span = high - low if high > low else 1.0
    n, mass, moment, square, running = 0, 0.0, 0.0, 0.0, 0.0
    prefix[0, 0], prefix[1, 0], prefix[2, 0] = 0.0, 0.0, 0.0
    for center, weight in zip(centers, weights):  # noqa: B905
        if weight == 0:
            continue
        running += weight
        step = running / total - mass
        mass = running / total
        u = (center - low) / span
        moment += step * u
        square += step * (u * u)
        if n == 0 or center > values[n - 1]:
            values[n] = center
            n += 1
        prefix[0, n], prefix[1, n], prefix[2, n] = mass, moment, square
    return n, low, span, total


@compiled
def _cost(prefix: Prefix, start: int, stop: int) -> float:
    """Squared error of an interval around its mean: sum w u^2 - (sum w u)^2 / sum w."""
    weight, moment = prefix[0, stop] - prefix[0, start], prefix[1, stop] - prefix[1, start]
    error: float = prefix[2, stop] - prefix[2, start] - moment * moment / max(weight, _TINY)
    return max(error, 0.0)


@compiled
def _fill_rows(prefix: Prefix, n: int, rows: Float64[np.ndarray, "n_rows positions"], cuts: Row) -> None:
    """Writes ``D[1], D[2], ...``, each from the one before."""
    base = np.empty(n + 1)
    for position in range(n + 1 if len(rows) else 0):
        rows[0, position] = _cost(prefix, 0, position)
    for level in range(1, len(rows)):
        for position in range(n + 1):
            base[position] = rows[level - 1, position] - prefix[2, position]
        _fill_row(prefix, base, cuts, rows[level])


@compiled
def _fill_row(prefix: Prefix, base: Row, cuts: Int64[np.ndarray, " positions"], row: Row) -> None:
    """Writes ``min_i D[i] + cost(i, j)`` at every position j; `base` holds D less the squares before i.

    The best cuts at both ends of a stride bound those within, so that each pass over halved strides takes O(n). Rows
    ascend in theory; the last loop makes them ascend where rounding decided ties.
    """
    # D[i] + cost(i, j) = D[i] + (Q_j - Q_i) - (S_j - S_i)^2 / (W_j - W_i): Q_j is constant in i and added at the end.
    n = len(base) - 1
    stride, cuts[0], row[0] = 1, 0, 0.0
    while 2 * stride <= n:
        stride *= 2
    while stride:
        for stop in range(stride, n + 1, 2 * stride):
            furthest = stop - 1
            if stop + stride <= n:
                furthest = min(furthest, cuts[stop + stride])
            least, cut = np.inf, 0
            for start in range(cuts[stop - stride], furthest + 1):
                weight, moment = prefix[0, stop] - prefix[0, start], prefix[1, stop] - prefix[1, start]
                error = base[start] - moment * moment / max(weight, _TINY)
                if error < least:
                    least, cut = error, start
            cuts[stop], row[stop] = cut, least + prefix[2, stop]
        stride //= 2
    for stop in range(1, n + 1):
        row[stop] = max(row[stop], row[stop - 1])


@compiled
def _last_start(prefix: Prefix, row: Row, stop: int) -> int:
    """Start of the last optimal interval before a position."""
    least, best = np.inf, 0
    for start in range(stop + 1):
        error = row[start] + _cost(prefix, start, stop)
        if error < least:
            least, best = error, start
    return best


def kmeans_1d(
    centers: Float[Tensor, "problems bins"], weights: Float[Tensor, "problems bins"], n_levels: int
) -> Float[Tensor, "problems n_levels"]:
    """Ascending levels that minimise ``sum_i w_i (x_i - Q(x_i))^2`` exactly.

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
        raise InvalidValueError(message)


def _check(who: str, centers: Tensor, weights: Tensor, n_levels: int) -> None:
    """Validates the arguments; errors count the offending values."""
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
