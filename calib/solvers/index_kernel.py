"""Counts of rounded values, compiled: what indices of a step occur, what they take, and what they leave.

Every function writes one answer for each channel. Indices are those of float32: ``rint(x / step)``.
"""

import numpy as np
from jaxtyping import Float32, Float64

from calib.solvers.compiled import compiled

REACH = 512
"""Tables go no further than this on either side of the index zero; what lies beyond is escaped."""

PRIOR = 0.5
"""Occurrences of every index, and of the escape symbol, that are added to those that were counted."""

ESCAPE_BITS = 5.0
"""What follows an escape symbol, besides the bits of the distance from the table."""

Channels = Float32[np.ndarray, "channels tokens"]
Sums = Float64[np.ndarray, "channels symbols"]
Answers = Float64[np.ndarray, " channels"]


@compiled
def write_counts(x: Channels, step: np.float32, counts: Sums, sums: Sums) -> None:
    """Adds up how often each index occurs, and what is rounded to it less the index, in steps; last, all escaped."""
    for channel in range(len(x)):
        for value in x[channel]:
            a = value / step
            index = np.rint(a)
            symbol = int(index) + REACH if abs(index) <= REACH else 2 * REACH + 1
            counts[channel, symbol] += 1
            sums[channel, symbol] += a - index


@compiled
def write_bits(ascending: Channels, step: np.float32, bits: Answers) -> None:
    """Writes what each channel takes if every token has a table that has not counted it.

    Equal indices are neighbours, so that the end of each run of them is found by bisection.
    """
    n = ascending.shape[1]
    for channel in range(len(ascending)):
        x = ascending[channel]
        first, last = _run_end(x, step, 0, -REACH - 1), _run_end(x, step, 0, REACH)
        lowest, highest = 0.0, 0.0
        if first < last:
            lowest, highest = min(np.rint(x[first] / step), 0.0), max(np.rint(x[last - 1] / step), 0.0)
        known = min(highest + 1, REACH) - max(lowest - 1, -REACH) + 2
        total = np.log2(n - 1 + PRIOR * known)
        taken, start = 0.0, first
        while start < last:
            stop = _run_end(x, step, start, np.rint(x[start] / step))
            taken += (stop - start) * (total - np.log2(stop - start - 1 + PRIOR))
            start = stop
        escaped = n - (last - first)
        if escaped:
            taken += escaped * (total - np.log2(escaped - 1 + PRIOR))
        for place in range(escaped):
            index = np.rint(x[place if place < first else place + last - first] / step)
            taken += ESCAPE_BITS + np.floor(np.log2(2.0 * (abs(index) - REACH)))
        bits[channel] = taken


@compiled
def write_errors(ascending: Channels, step: np.float32, errors: Answers) -> None:
    """Writes each channel's squared error, in steps, where every index stands for its mean, and so do all escaped."""
    for channel in range(len(ascending)):
        error, escaped, escaped_sum = 0.0, 0, 0.0
        count, total, index = 0, 0.0, np.float32(0)
        for value in ascending[channel]:
            a = value / step
            if np.rint(a) != index:
                error -= total * total / max(count, 1)
                count, total, index = 0, 0.0, np.rint(a)
            rest = np.float64(a - index)
            error += rest * rest
            if abs(index) <= REACH:
                count, total = count + 1, total + rest
            else:
                escaped, escaped_sum = escaped + 1, escaped_sum + rest
        errors[channel] = error - total * total / max(count, 1) - escaped_sum * escaped_sum / max(escaped, 1)


@compiled
def _run_end(x: Float32[np.ndarray, " tokens"], step: np.float32, start: int, index: float) -> int:
    """First place from `start` on whose index is above `index`: strides that double until one is, then bisection."""
    stride = 1
    while start + stride <= len(x) and np.rint(x[start + stride - 1] / step) <= index:
        start += stride
        stride *= 2
    stop = min(start + stride - 1, len(x))
    while start < stop:
        middle = (start + stop) // 2
        if np.rint(x[middle] / step) <= index:
            start = middle + 1
        else:
            stop = middle
    return start
