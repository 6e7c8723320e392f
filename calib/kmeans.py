"""Exact weighted k-means on a line, for many histograms at once.

Optimal clusters of sorted points are intervals, so the optimum is a shortest path over bins:
``D[k][j] = min_i D[k-1][i] + cost(i, j)``, where ``cost(i, j)`` is the squared error of bins ``i..j-1`` around their
mean, read off prefix sums in O(1). The best ``i`` never decreases with ``j``, hence a divide and conquer in
O(k n log n). Lloyd iterations, in contrast, can stop at a local optimum.

A level may serve no bin, so ``D[k]`` is the best of *at most* k levels. Costs are computed around the weighted mean, in
units of total weight times squared range, where rounding is about 1e-15.

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

# Children per node of the divide and conquer, and candidates per dense tile. Of 4, 8 and 16 the fastest, measured on
# few large and on many small problems.
_WIDTH = 8
# Bins per batch of problems. One stage then holds arrays of some 3 * 17 * 2**14 doubles: bounded, and close to cache.
_BATCH_BINS = 2**14
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
        Levels in float64, on the device of `centers`. On the CPU they do not depend on which problems share a call.

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
    batches = zip(torch.split(centers.double(), size), torch.split(weights.double(), size), strict=True)
    return torch.cat([solve(x, w, n_levels) for x, w in batches])


def _levels(centers: Tensor, weights: Tensor, n_levels: int) -> Tensor:
    """Means of the optimal intervals, or the distinct values themselves where there are no more than levels."""
    values = _occupied(centers, weights)
    prefix, origin, span = _prefix_sums(values, weights)
    bounds = _bounds(prefix, _rows(prefix, n_levels))
    start, stop, last_bin = bounds[:, :-1], bounds[:, 1:], values.shape[-1] - 1
    weight, moment, _ = (_at(prefix, stop) - _at(prefix, start)).unbind()
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
    closing = _cost(prefix, prefix[..., -1:])
    best = torch.stack([(row + closing).amin(-1) for row in _rows(prefix, n_levels)], -1)
    return best.cummin(-1).values * weights.sum(-1, keepdim=True) * span.square()


def _occupied(centers: Tensor, weights: Tensor) -> Tensor:
    """Centers in which an empty bin repeats its occupied neighbour, so that it adds neither a value nor range."""
    before = centers.masked_fill(weights == 0, -torch.inf).cummax(-1).values
    first = centers.masked_fill(weights == 0, torch.inf).amin(-1, keepdim=True)
    return before.maximum(first)


def _prefix_sums(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ``(w, w u, w u^2)`` before each of ``bins + 1`` positions, and origin and span of u.

    With ``values = origin + span * u``, ``sum w = 1`` and ``sum w u = 0``, an offset of the data cancels before it is
    squared. Totals too are read off running sums, whose order, unlike that of ``sum``, is the same in any batch.
    """
    low, span = values[:, :1], values[:, -1:] - values[:, :1]
    span = span.where(span > 0, 1.0)
    u = (values - low) / span
    total, moment = torch.stack([weights, weights * u]).cumsum(-1)[..., -1:].unbind()
    mean = moment / total
    u, w = u - mean, weights / total
    return pad(torch.stack([w, w * u, w * u.square()]).cumsum(-1), (1, 0)), low + span * mean, span


def _at(prefix: Tensor, position: Tensor) -> Tensor:
    return prefix.gather(-1, position.expand(len(prefix), -1, -1))


def _cost(start: Tensor, stop: Tensor) -> Tensor:
    """Squared error around the mean, from the prefix sums at two positions; zero if they coincide or are swapped."""
    w, s, q = (stop - start).unbind()  # a fresh array, so what follows may overwrite it
    return q.sub_(s.square_().div_(w.clamp_(min=_TINY))).clamp_(min=0)


def _rows(prefix: Tensor, count: int) -> list[Tensor]:
    """Rows ``D[0], ..., D[count - 1]`` of the programme, each ``problems positions``."""
    row = torch.full_like(prefix[0], torch.inf)
    row[:, 0] = 0
    rows = [row]
    while len(rows) < count:
        rows.append(_next_row(prefix, rows[-1]))
    return rows


def _next_row(prefix: Tensor, row: Tensor) -> Tensor:
    """``min_i row[i] + cost(i, j)`` at every position j, by strides that shrink to 1.

    The best i at the two ends of a block of ``_WIDTH`` strides bounds it inside. The ranges of all blocks add up to
    n + blocks candidates, each for ``_WIDTH`` positions; with the tiles' padding, under 3 n ``_WIDTH`` costs a stride.
    Best cuts and rows ascend by theory; ``cummax`` holds ties decided by rounding to it.
    """
    n_bins = row.shape[-1] - 1
    base = torch.arange(len(row), device=row.device)[:, None] * (n_bins + 1)
    best, stride = torch.cat([base, base + n_bins], -1), 1
    while stride * _WIDTH < n_bins:
        stride *= _WIDTH
    while True:
        n_blocks = best.shape[-1] - 1
        inside = (stride * torch.arange(1, n_blocks * _WIDTH + 1, device=row.device)).clamp(max=n_bins)
        positions = (base + inside).view(-1, _WIDTH)
        values, best = _best_cuts(prefix, row, best[:, :-1].flatten(), best[:, 1:].flatten(), positions)
        if stride == 1:
            return pad(values.view(len(row), -1)[:, :n_bins], (1, 0)).cummax(-1).values
        n_known = -(-n_bins // stride)
        best = torch.cat([base, best.view(len(row), -1)[:, :n_known]], -1).cummax(-1).values
        stride //= _WIDTH


def _best_cuts(prefix: Tensor, row: Tensor, first: Tensor, last: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and first minimiser of ``row[i] + cost(i, j)`` over ``first <= i <= last``, for each block's positions j.

    All indices count through the problems; `first` and `last` are ``blocks``, `positions` is ``blocks width``. A range
    is cut into tiles of ``_WIDTH`` candidates, the last one repeated at its end; all tiles form one dense array, tiles
    innermost. A candidate behind j needs no mask: it costs ``row[i] >= row[j]``, and j itself comes before it.
    """
    prefix, row = prefix.flatten(1), row.flatten()
    n_tiles = (last - first) // _WIDTH + 1
    block = torch.arange(len(first), device=row.device).repeat_interleave(n_tiles)
    tile = torch.arange(len(block), device=row.device) - (n_tiles.cumsum(0) - n_tiles)[block]
    offset = torch.arange(_WIDTH, device=row.device)[:, None]
    candidates = (first[block] + _WIDTH * tile + offset).minimum(last[block])
    costs = _cost(prefix[:, candidates][:, :, None], prefix[:, positions.T[:, block]][:, None])
    lowest, where = costs.add_(row[candidates][:, None]).min(0)
    value = _least_per_block(lowest.T, n_tiles)
    cut = candidates.gather(0, where).T.double().masked_fill(value[block] < lowest.T, torch.inf)
    return value, _least_per_block(cut, n_tiles).long()


def _least_per_block(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(x.contiguous(), "min", lengths=lengths, axis=0, unsafe=True)


def _bounds(prefix: Tensor, rows: list[Tensor]) -> Tensor:
    """Positions that separate the optimal intervals, ``problems len(rows)+1``: the shortest path, read from its end."""
    stop = torch.full_like(rows[0][:, :1], prefix.shape[-1] - 1, dtype=torch.long)
    bounds = [stop]
    for row in reversed(rows):
        stop = (row + _cost(prefix, _at(prefix, stop))).argmin(-1, keepdim=True)
        bounds.insert(0, stop)
    return torch.cat(bounds, -1)
