"""Compiled inner loops of the statistics. Arrays must be contiguous; counts are added in place."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.solvers.compiled import compiled

Floats = NDArray[np.float32]
Weights = NDArray[np.float64] | None


@compiled
def count_channels(
    columns: Floats, weights: Weights, per_width: Floats, first: NDArray[np.int32], counts: NDArray[Any]
) -> None:
    """Adds one, or a weight, to the bin of every value of each channel.

    Parameters
    ----------
    columns : "channels tokens"
        Values.
    weights : "channels tokens" or None
        Weights of the values.
    per_width : "channels"
        Bins per unit.
    first : "channels"
        Number of the first bin; bin 0 starts at zero.
    counts : "channels bins"
        Updated in place.
    """
    channels, tokens = columns.shape
    index, last = np.empty(tokens, np.int32), np.int32(counts.shape[1] - 1)
    for channel in range(channels):
        own, before = counts[channel], first[channel]
        # A loop without the scatter of counts is vectorised. 1 / width is a power of two, so the product is exact.
        for token in range(tokens):
            place = np.int32(math.floor(columns[channel, token] * per_width[channel])) - before
            index[token] = min(max(np.int32(place), np.int32(0)), last)  # stay in bounds for any input
        for token in range(tokens):
            own[index[token]] += 1 if weights is None else weights[channel, token]


@compiled
def coarsen(
    counts: NDArray[Any], first: NDArray[np.int32], shift: NDArray[np.int32], new_first: NDArray[np.int32]
) -> None:
    """Moves the counts of each channel into bins that are wider by a power of two and start elsewhere.

    Parameters
    ----------
    counts : "channels bins"
        Overwritten.
    first : "channels"
        Number of the first bin; bin 0 starts at zero.
    shift : "channels"
        Binary logarithm of the number of old bins in a new one.
    new_first : "channels"
        Number of the first new bin.
    """
    channels, bins = counts.shape
    for channel in range(channels):
        if shift[channel] or first[channel] != new_first[channel]:
            own = counts[channel]
            before = own.copy()
            own[:] = 0
            for place in range(bins):
                if before[place]:
                    target = ((first[channel] + place) >> shift[channel]) - new_first[channel]
                    own[min(max(target, 0), bins - 1)] += before[place]


@compiled
def count_tokens(
    ordered: Floats,
    x: Floats,
    weights: Weights,
    fractions: NDArray[np.float64],
    counts: NDArray[Any],
    spread: NDArray[np.float64],
) -> None:
    """Adds every value of each token to its bin within the range of the token, once for each outlier fraction.

    Parameters
    ----------
    ordered : "tokens channels"
        Values, ascending in each token.
    x : "tokens channels"
        Values; in any order if there are no weights.
    weights : "tokens channels" or None
        Weights of the values.
    fractions : "fractions"
        Outlier fractions, half of each at either end.
    counts : "fractions bins"
        Updated by one, or the weight, per value.
    spread : "fractions bins"
        Updated by the same times the squared half-range of the token.
    """
    tokens, channels = x.shape
    bins, last = counts.shape[1], channels - 1
    for row in range(len(fractions)):
        position = fractions[row] / 2 * last
        outer = int(position)
        inner, part = min(outer + 1, last), np.float32(position - outer)
        for token in range(tokens):
            own = ordered[token]
            start, stop = 0, last
            if fractions[row] > 0:
                lower, upper = own[outer], own[last - outer]
                step_up, step_down = own[inner] - lower, own[last - inner] - upper
                # One rounding, as the fused multiply-add of torch.lerp; from the nearer end, as it does.
                if part < 0.5:
                    lower = np.float32(lower + np.float64(step_up) * part)
                    upper = np.float32(upper + np.float64(step_down) * part)
                else:
                    lower = np.float32(own[inner] + np.float64(step_up) * (part - np.float32(1)))
                    upper = np.float32(own[last - inner] + np.float64(step_down) * (part - np.float32(1)))
                while start < last and own[start] <= lower:
                    start += 1
                while stop > 0 and own[stop] >= upper:
                    stop -= 1
            low, high = own[start], own[stop]
            half_range = (high - low) / np.float32(2)
            if not half_range > 0:
                continue
            square = np.float64(half_range) * np.float64(half_range)
            per_bin, limit = np.float32(1) / half_range * np.float32(bins / 2), np.float32(bins - 1)
            for channel in range(channels):
                value = own[channel] if weights is None else x[token, channel]
                if low <= value <= high:
                    where = (value - low) * per_bin
                    # A range of a few denormals has no finite inverse: what is not a number belongs to the first bin.
                    index = np.int32(min(where, limit)) if where > 0 else 0
                    weight = 1 if weights is None else weights[token, channel]
                    counts[row, index] += weight
                    spread[row, index] += square * weight


@compiled
def keep_extremes(kept: Floats, arriving: Floats, sign: int) -> None:
    """Merges new values into the smallest values of each channel (sign 1), or into the largest (sign -1).

    Parameters
    ----------
    kept : "channels depth"
        Values so far, the most extreme first; overwritten.
    arriving : "channels values"
        New values, ascending.
    sign : {1, -1}
        End of the distribution: 1 for the smallest, -1 for the largest values.
    """
    channels, depth = kept.shape
    n_new = arriving.shape[1]
    for channel in range(channels):
        held, new = kept[channel].copy(), arriving[channel] if sign > 0 else arriving[channel][::-1]
        i = j = 0  # merge of two sorted lists, stopped after `depth` values
        for place in range(depth):
            if j < n_new and sign * new[j] < sign * held[i]:
                kept[channel, place] = new[j]
                j += 1
            else:
                kept[channel, place] = held[i]
                i += 1


@compiled
def add_pairs(
    x: Floats, first: NDArray[np.int64], second: NDArray[np.int64], largest: Floats, sums: NDArray[np.float64]
) -> None:
    """Accumulates the squared norm of every channel pair of each token.

    Parameters
    ----------
    x : "tokens channels"
        Values.
    first, second : "pairs"
        Channels of each pair.
    largest : "pairs"
        Largest squared norm; updated in place.
    sums : "pairs"
        Sum of squared norms; updated in place.
    """
    for token in range(len(x)):
        for pair in range(len(first)):
            a, b = x[token, first[pair]], x[token, second[pair]]
            square = a * a + b * b
            sums[pair] += square
            largest[pair] = max(largest[pair], square)
