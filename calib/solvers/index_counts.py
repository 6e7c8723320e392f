"""How often each index occurs when tokens are rounded to multiples of a step, and what that says about the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int16
from torch import Tensor

from artifacts.coding.frequency_coder import TOTAL
from calib.solvers.index_kernel import PRIOR, REACH, write_bits, write_counts, write_errors
from calib.solvers.threads import in_parts

_WIDEST, _FINEST = 4.0, 2.0**-20
"""Widest and finest step, in largest deviations: no index is beyond what a stream can hold."""

_TINY = torch.finfo(torch.float32).tiny

_PRECISION = 1e-3
"""Of the rate."""

_CURVE_TOKENS = 1024
"""Tokens that the trade of bits against distortion is measured on."""

_CURVE_STEP = 0.05
"""Bits per channel between two points of that trade."""


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
