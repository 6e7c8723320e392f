"""The best partition of ordered points into intervals, compiled: the programme behind `calib.solvers.kmeans`.

A problem is reduced to its distinct values of positive weight and to `prefix`, sums of ``(w, w u, w u^2)`` before each
of ``n + 1`` positions between them. With ``value = low + span * u``, ``0 <= u <= 1`` and ``sum w = 1``, an offset of
the data cancels before it is squared, and all three sums ascend.
"""

import numpy as np
from jaxtyping import Float64, Int64

from calib.solvers.compiled import compiled

_TINY = float(np.finfo(np.float64).tiny)

Values = Float64[np.ndarray, " bins"]
Row = Float64[np.ndarray, " positions"]
Prefix = Float64[np.ndarray, "3 positions"]
Problems = Float64[np.ndarray, "problems bins"]
Answers = Float64[np.ndarray, "problems n_levels"]


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
    """Writes the distinct values and the sums; gives their number, the least, the range and the total weight.

    The weights are the steps of their own sum: one that vanishes in it vanishes in all three, so an interval without
    weight has no moment either.
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
    """Squared error around the mean of an interval."""
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

    The best cuts at the two ends of a stride bound those within, so that strides which halve take O(n) each. Rows
    ascend by theory; what is made to ascend here are ties decided by rounding.
    """
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
    """Where the last of the optimal intervals before a position begins."""
    least, best = np.inf, 0
    for start in range(stop + 1):
        error = row[start] + _cost(prefix, start, stop)
        if error < least:
            least, best = error, start
    return best
