"""Rate and distortion of uniform quantization with entropy coding, from counts of the indices of calibration tokens.

Indices are computed in float32 as ``rint(x / step)``. Compiled functions write one result per channel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int16
from torch import Tensor

from artifacts.coding.frequency_coder import TOTAL
from calib.solvers.compiled import compiled
from calib.solvers.threads import in_parts

REACH = 512
"""Largest magnitude of an index in a table; indices beyond are escaped."""

# Krichevsky-Trofimov estimator (1981): (count + 1/2) / (n + alphabet / 2), the Bayes estimate under Jeffreys' prior,
# which codes n symbols in about log2(n) / 2 bits per free parameter more than the best table.
PRIOR = 0.5
"""Pseudo-count of every index and of the escape symbol."""

ESCAPE_BITS = 5.0
"""Bits of an escape besides those of the distance from the table: the bit length of that distance."""

Channels = Float32[np.ndarray, "channels tokens"]

Sums = Float64[np.ndarray, "channels symbols"]

Answers = Float64[np.ndarray, " channels"]

_WIDEST, _FINEST = 4.0, 2.0**-20
"""Widest and finest step, relative to the largest deviation: every index fits a stream."""

_TINY = torch.finfo(torch.float32).tiny

_PRECISION = 1e-3
"""Relative tolerance of the rate."""

_CURVE_TOKENS = 1024
"""Tokens for the rate-distortion curve."""

_CURVE_STEP = 0.05
"""Bits per channel between two points of the rate-distortion curve."""


@compiled
def write_counts(x: Channels, step: np.float32, counts: Sums, sums: Sums) -> None:
    """Adds up the occurrences of each index, and the residuals a - index in steps; escaped indices come last."""
    for channel in range(len(x)):
        for value in x[channel]:
            a = value / step
            index = np.rint(a)
            symbol = int(index) + REACH if abs(index) <= REACH else 2 * REACH + 1
            counts[channel, symbol] += 1
            sums[channel, symbol] += a - index


@compiled
def write_bits(ascending: Channels, step: np.float32, bits: Answers) -> None:
    """Writes the bits of each channel by leave-one-out: every token is coded by the table of all other tokens."""
    # Without a token the count c of its index is c - 1 of n - 1: it takes log2((n - 1 + PRIOR * known) / (c - 1 +
    # PRIOR)) bits, so that the rate of rare indices is not underestimated. Runs of an index end by bisection.
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
        # An escaped index i is coded as 2 d or 2 d + 1 with d = |i| - REACH: floor(log2(2 d)) bits after the length.
        for place in range(escaped):
            index = np.rint(x[place if place < first else place + last - first] / step)
            taken += ESCAPE_BITS + np.floor(np.log2(2.0 * (abs(index) - REACH)))
        bits[channel] = taken


@compiled
def write_errors(ascending: Channels, step: np.float32, errors: Answers) -> None:
    """Writes the squared error of each channel, in squared steps, with centroids as reconstruction values."""
    # Within a cell sum (r - mean r)^2 = sum r^2 - (sum r)^2 / count, with r = a - index; values are sorted, so a cell
    # is a run. All escaped indices have one common centroid shift.
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
    """First place from `start` on whose index is above `index`, by exponential search and bisection."""
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


@dataclass(frozen=True, eq=False)
class IndexCounts:
    """Counts of the indices for a step, from -REACH to REACH and, last, all others.

    Parameters
    ----------
    step : float
        Step, in units of the deviations.
    counts : Float64[Tensor, "channels symbols"]
        Occurrences of each index.
    sums : Float64[Tensor, "channels symbols"]
        Sums of the residuals x / step - index.
    """

    step: float
    counts: Float64[Tensor, "channels symbols"]
    sums: Float64[Tensor, "channels symbols"]

    @classmethod
    def of(cls, deviation: Float32[Tensor, "tokens channels"], step: float) -> "IndexCounts":
        """Index counts of tokens for a step."""
        x, step = _by_channel(deviation), _possible(step)
        counts, sums = np.zeros((2, len(x), 2 * REACH + 2))
        in_parts(lambda part: write_counts(x[part], np.float32(step), counts[part], sums[part]), len(x))
        return cls(step, torch.from_numpy(counts), torch.from_numpy(sums))

    @property
    def known(self) -> Bool[Tensor, "channels symbols"]:
        """True for indices in the tables (one beyond the range that occurs, and zero) and for the escape symbol."""
        # Dilate the seen indices by one (max pooling of width 3), then fill between the first and the last: cumulative
        # maxima from both ends are both one exactly in between.
        seen = self.counts[:, :-1] > 0
        seen[:, REACH] = True
        wide = torch.nn.functional.max_pool1d(seen.float(), 3, stride=1, padding=1)
        inside = (wide.cummax(dim=1).values * wide.flip(1).cummax(dim=1).values.flip(1)).bool()
        return torch.cat([inside, torch.ones_like(inside[:, :1])], dim=1)

    def probabilities(self) -> Float64[Tensor, "channels symbols"]:
        """Estimated probability of each symbol; zero outside the tables."""
        smoothed = (self.counts + PRIOR) * self.known
        return smoothed / smoothed.sum(dim=1, keepdim=True)

    def tables(self) -> tuple[Int16[Tensor, " channels"], Int16[Tensor, " channels"], Int16[Tensor, " symbols"]]:
        """Smallest index and number of indices of each channel, and all frequencies."""
        known, p = self.known, self.probabilities()
        n_symbols = known.sum(dim=1)
        # A range coder needs positive integers with the sum TOTAL: one for each symbol, the rest in proportion, and
        # what rounding down leaves (less than one per symbol) to the most frequent, where it costs least.
        frequencies = (p * (TOTAL - n_symbols)[:, None]).floor().long() + known
        frequencies.scatter_add_(1, p.argmax(dim=1, keepdim=True), TOTAL - frequencies.sum(dim=1, keepdim=True))
        first = known.int().argmax(dim=1) - REACH
        return first.to(torch.int16), (n_symbols - 1).to(torch.int16), frequencies[known].to(torch.int16)

    def shifts(self) -> Float64[Tensor, " indices"]:
        """Centroid of the cell of each index relative to the index, in steps."""
        return (self.sums / self.counts.clamp_min(1))[:, :-1][self.known[:, :-1]]


@dataclass(frozen=True, eq=False)
class Trials:
    """Sorted deviations of each channel, to measure rate and distortion of a step.

    Parameters
    ----------
    ascending : Float32[ndarray, "channels tokens"]
        Deviations in ascending order.
    """

    ascending: Float32[np.ndarray, "channels tokens"]

    @classmethod
    def of(cls, deviation: Float32[Tensor, "tokens channels"]) -> "Trials":
        """Sorted deviations of tokens."""
        ascending = _by_channel(deviation)
        in_parts(lambda part: ascending[part].sort(axis=1), len(ascending))
        return cls(ascending)

    @property
    def widest(self) -> float:
        """The largest deviation."""
        return float(np.abs(self.ascending[:, [0, -1]]).max())

    def rate(self, step: float) -> float:
        """Mean bits per channel for unseen tokens, by leave-one-out."""
        mean: float = self._answers(write_bits, step).sum() / self.ascending.size
        return mean

    def distortion(self, step: float) -> float:
        """Mean squared error of a token, summed over its channels, with centroids as reconstruction values."""
        mean: float = self._answers(write_errors, step).sum() / self.ascending.shape[1]
        return step**2 * mean

    def _answers(self, write: Callable[..., None], step: float) -> Float64[np.ndarray, " channels"]:
        found = np.empty(len(self.ascending))
        in_parts(lambda part: write(self.ascending[part], np.float32(step), found[part]), len(found))
        return found


def with_rate(deviation: Float32[Tensor, "tokens channels"], bits: float) -> IndexCounts:
    """Counts for the step whose rate is `bits` per channel, by bisection; the finest step if no rate is that high.

    The rate is bounded if few channels vary: a finer step adds bits to those alone.
    """
    # The rate falls as the step grows, about one bit per factor of two (high-resolution theory, Gish and Pierce 1968),
    # so the bisection is in the logarithm of the step.
    trials = Trials.of(deviation)
    if trials.widest == 0:
        return IndexCounts.of(deviation, 1.0)
    low, high = max(_FINEST * trials.widest, _TINY), _WIDEST * trials.widest
    while True:
        step = _possible((low * high) ** 0.5)
        rate = trials.rate(step)
        if abs(rate - bits) <= _PRECISION * bits or high < low * (1 + _PRECISION):
            return IndexCounts.of(deviation, step)
        low, high = (step, high) if rate > bits else (low, step)


def trade(deviation: Float32[Tensor, "tokens channels"], most_bits: float) -> tuple[tuple[float, float], ...]:
    """Rate-distortion curve of a token as (distortion saved per bit, bits) of successive increments of the rate.

    Beyond the rate of the finest step nothing is saved.
    """
    trials, points = Trials.of(deviation[:_CURVE_TOKENS]), list[tuple[float, float]]()
    for step in _falling_steps(trials.widest):
        points.append((trials.rate(step), trials.distortion(step)))
        if points[-1][0] >= most_bits:
            break
    if not points:
        return ()
    rates, distortions = np.maximum.accumulate(np.array(points), axis=0).T[0], np.array(points).T[1]
    # D falls about as 2^(-2 R), so log D is interpolated linearly in R. The gains are then made non-increasing (a
    # convex curve), as an allocation by equal slopes needs.
    bits = np.arange(0, most_bits, _CURVE_STEP)
    falling = np.exp(np.interp(bits, rates, np.log(distortions.clip(min=np.finfo(float).tiny))))
    unit = _CURVE_STEP * deviation.shape[1]
    gains = np.minimum.accumulate(-np.diff(falling) / unit)
    return tuple((float(gain), unit) for gain in gains)


def _falling_steps(widest: float) -> list[float]:
    """Steps from the widest to the finest, each smaller by a factor of sqrt(2)."""
    steps = [_WIDEST * widest * 2 ** (-n / 2) for n in range(1 + round(2 * math.log2(_WIDEST / _FINEST)))]
    return [_possible(step) for step in steps if step >= _TINY]


def _possible(step: float) -> float:
    """Step as a positive float32 number."""
    return float(torch.tensor(step).clamp_min(_TINY))


def _by_channel(deviation: Float32[Tensor, "tokens channels"]) -> Float32[np.ndarray, "channels tokens"]:
    return np.array(deviation.numpy().T, order="C")
