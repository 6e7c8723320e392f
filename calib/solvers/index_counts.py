"""Counts of the indices that tokens have when they are rounded to multiples of a step, and what they say about it.

Indices are those of float32, ``rint(x / step)``. A compiled function writes one answer for each channel.
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
"""Tables go no further than this on either side of the index zero; what lies beyond is escaped."""

PRIOR = 0.5
"""Occurrences of every index, and of the escape symbol, that are added to those that were counted."""

ESCAPE_BITS = 5.0
"""What follows an escape symbol, besides the bits of the distance from the table."""

Channels = Float32[np.ndarray, "channels tokens"]

Sums = Float64[np.ndarray, "channels symbols"]

Answers = Float64[np.ndarray, " channels"]

_WIDEST, _FINEST = 4.0, 2.0**-20
"""Widest and finest step, in largest deviations: no index is beyond what a stream can hold."""

_TINY = torch.finfo(torch.float32).tiny

_PRECISION = 1e-3
"""Of the rate."""

_CURVE_TOKENS = 1024
"""Tokens that the trade of bits against distortion is measured on."""

_CURVE_STEP = 0.05
"""Bits per channel between two points of that trade."""


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


@dataclass(frozen=True, eq=False)
class IndexCounts:
    """How often each index occurs with a step, for indices from -REACH to REACH and, last, all others.

    Parameters
    ----------
    step : float
        In units of the deviations.
    counts : Float64[Tensor, "channels symbols"]
        Occurrences.
    sums : Float64[Tensor, "channels symbols"]
        Of what is rounded to an index less the index, in steps.
    """

    step: float
    counts: Float64[Tensor, "channels symbols"]
    sums: Float64[Tensor, "channels symbols"]

    @classmethod
    def of(cls, deviation: Float32[Tensor, "tokens channels"], step: float) -> "IndexCounts":
        """Counts the tokens."""
        x, step = _by_channel(deviation), _possible(step)
        counts, sums = np.zeros((2, len(x), 2 * REACH + 2))
        in_parts(lambda part: write_counts(x[part], np.float32(step), counts[part], sums[part]), len(x))
        return cls(step, torch.from_numpy(counts), torch.from_numpy(sums))

    @property
    def known(self) -> Bool[Tensor, "channels symbols"]:
        """The indices of the tables, which go one beyond the ends of what occurs and contain zero, and the others."""
        seen = self.counts[:, :-1] > 0
        seen[:, REACH] = True
        wide = torch.nn.functional.max_pool1d(seen.float(), 3, stride=1, padding=1)
        inside = (wide.cummax(dim=1).values * wide.flip(1).cummax(dim=1).values.flip(1)).bool()
        return torch.cat([inside, torch.ones_like(inside[:, :1])], dim=1)

    def shares(self) -> Float64[Tensor, "channels symbols"]:
        """How likely each symbol is held to be; zero for those in no table."""
        smoothed = (self.counts + PRIOR) * self.known
        return smoothed / smoothed.sum(dim=1, keepdim=True)

    def tables(self) -> tuple[Int16[Tensor, " channels"], Int16[Tensor, " channels"], Int16[Tensor, " symbols"]]:
        """Smallest index and number of indices of each channel, and all frequencies."""
        known, shares = self.known, self.shares()
        n_symbols = known.sum(dim=1)
        frequencies = (shares * (TOTAL - n_symbols)[:, None]).floor().long() + known
        frequencies.scatter_add_(1, shares.argmax(dim=1, keepdim=True), TOTAL - frequencies.sum(dim=1, keepdim=True))
        first = known.int().argmax(dim=1) - REACH
        return first.to(torch.int16), (n_symbols - 1).to(torch.int16), frequencies[known].to(torch.int16)

    def shifts(self) -> Float64[Tensor, " indices"]:
        """Mean of what is rounded to each index, less the index."""
        return (self.sums / self.counts.clamp_min(1))[:, :-1][self.known[:, :-1]]


@dataclass(frozen=True, eq=False)
class Trials:
    """Tokens that steps are tried on: each channel's, in ascending order.

    Parameters
    ----------
    ascending : Float32[ndarray, "channels tokens"]
        Deviations.
    """

    ascending: Float32[np.ndarray, "channels tokens"]

    @classmethod
    def of(cls, deviation: Float32[Tensor, "tokens channels"]) -> "Trials":
        """Of these tokens."""
        ascending = _by_channel(deviation)
        in_parts(lambda part: ascending[part].sort(axis=1), len(ascending))
        return cls(ascending)

    @property
    def widest(self) -> float:
        """The largest deviation."""
        return float(np.abs(self.ascending[:, [0, -1]]).max())

    def rate(self, step: float) -> float:
        """Mean bits per channel that other tokens would take: each token with a table that has not counted it."""
        mean: float = self._answers(write_bits, step).sum() / self.ascending.size
        return mean

    def distortion(self, step: float) -> float:
        """Mean squared error of a token, summed over its channels, where each index stands for its mean."""
        mean: float = self._answers(write_errors, step).sum() / self.ascending.shape[1]
        return step**2 * mean

    def _answers(self, write: Callable[..., None], step: float) -> Float64[np.ndarray, " channels"]:
        found = np.empty(len(self.ascending))
        in_parts(lambda part: write(self.ascending[part], np.float32(step), found[part]), len(found))
        return found


def with_rate(deviation: Float32[Tensor, "tokens channels"], bits: float) -> IndexCounts:
    """Counts with the widest step that takes the bits per channel, found by bisection; the finest, if none takes them.

    Rates end where only few channels move: a finer step adds bits to those alone.
    """
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
    """(distortion saved per bit, bits) of a token, as finer and finer steps bring them, up to a rate per channel.

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
    bits = np.arange(0, most_bits, _CURVE_STEP)
    falling = np.exp(np.interp(bits, rates, np.log(distortions.clip(min=np.finfo(float).tiny))))
    unit = _CURVE_STEP * deviation.shape[1]
    gains = np.minimum.accumulate(-np.diff(falling) / unit)
    return tuple((float(gain), unit) for gain in gains)


def _falling_steps(widest: float) -> list[float]:
    """From the widest step to the finest, each finer by the root of two."""
    steps = [_WIDEST * widest * 2 ** (-n / 2) for n in range(1 + round(2 * math.log2(_WIDEST / _FINEST)))]
    return [_possible(step) for step in steps if step >= _TINY]


def _possible(step: float) -> float:
    """As float32 holds it, above zero."""
    return float(torch.tensor(step).clamp_min(_TINY))


def _by_channel(deviation: Float32[Tensor, "tokens channels"]) -> Float32[np.ndarray, "channels tokens"]:
    return np.array(deviation.numpy().T, order="C")
