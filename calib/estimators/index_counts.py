"""How often each index occurs when tokens are rounded to multiples of a step, and what that says about the step."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int16
from torch import Tensor

from artifacts.frequency_coder import TOTAL

_REACH = 512
"""Tables go no further than this on either side of the index zero; what lies beyond is escaped."""

_PRIOR = 0.5
"""Occurrences of every index, and of the escape symbol, that are added to those that were counted."""

_ESCAPE_BITS = 5.0
"""What follows an escape symbol, besides the bits of the distance from the table."""

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
    """How often each index occurs with a step, for indices from -_REACH to _REACH and, last, all others.

    Parameters
    ----------
    step : float
        In units of the deviations.
    counts : Float64[Tensor, "channels symbols"]
        Occurrences.
    sums : Float64[Tensor, "channels symbols"]
        Of what is rounded to an index less the index, in steps.
    squares : float
        Mean over the tokens of the sum of its squares over the channels.
    escape_bits : float
        What follows all escape symbols.
    """

    step: float
    counts: Float64[Tensor, "channels symbols"]
    sums: Float64[Tensor, "channels symbols"]
    squares: float
    escape_bits: float

    @classmethod
    def of(cls, deviation: Float32[Tensor, "tokens channels"], step: float) -> "IndexCounts":
        """Counts the tokens."""
        step = float(torch.tensor(step).clamp_min(_TINY))
        n_channels, n_symbols = deviation.shape[1], 2 * _REACH + 2
        a = (deviation / step).T
        index = a.round()
        symbol = torch.where(index.abs() <= _REACH, index + _REACH, n_symbols - 1).long()
        flat = (symbol + n_symbols * torch.arange(n_channels)[:, None]).flatten()
        counts, sums = (
            torch.bincount(flat, weights, minlength=n_channels * n_symbols).double().view(n_channels, n_symbols)
            for weights in (None, (a - index).flatten().double())
        )
        squares = float((a - index).double().square().sum() / a.shape[1])
        beyond = 2 * (index.abs()[index.abs() > _REACH].double() - _REACH)
        escape_bits = float((_ESCAPE_BITS + beyond.log2().floor()).sum())
        return cls(step, counts, sums, squares, escape_bits)

    @property
    def known(self) -> Bool[Tensor, "channels symbols"]:
        """The indices of the tables, which go one beyond the ends of what occurs and contain zero, and the others."""
        seen = self.counts[:, :-1] > 0
        seen[:, _REACH] = True
        wide = torch.nn.functional.max_pool1d(seen.float(), 3, stride=1, padding=1)
        inside = (wide.cummax(dim=1).values * wide.flip(1).cummax(dim=1).values.flip(1)).bool()
        return torch.cat([inside, torch.ones_like(inside[:, :1])], dim=1)

    def shares(self) -> Float64[Tensor, "channels symbols"]:
        """How likely each symbol is held to be; zero for those in no table."""
        smoothed = (self.counts + _PRIOR) * self.known
        return smoothed / smoothed.sum(dim=1, keepdim=True)

    def rate(self) -> float:
        """Mean bits per channel that other tokens would take: each token with a table that has not counted it."""
        others = (self.counts - 1).clamp_min(0) + _PRIOR
        total = self.counts.sum(dim=1) - 1 + _PRIOR * self.known.sum(dim=1)
        bits = total.log2()[:, None] - others.log2()
        return (float((self.counts * bits).sum()) + self.escape_bits) / float(self.counts.sum())

    def tables(self) -> tuple[Int16[Tensor, " channels"], Int16[Tensor, " channels"], Int16[Tensor, " symbols"]]:
        """Smallest index and number of indices of each channel, and all frequencies."""
        known, shares = self.known, self.shares()
        n_symbols = known.sum(dim=1)
        frequencies = (shares * (TOTAL - n_symbols)[:, None]).floor().long() + known
        frequencies.scatter_add_(1, shares.argmax(dim=1, keepdim=True), TOTAL - frequencies.sum(dim=1, keepdim=True))
        first = known.int().argmax(dim=1) - _REACH
        return first.to(torch.int16), (n_symbols - 1).to(torch.int16), frequencies[known].to(torch.int16)

    def shifts(self) -> Float64[Tensor, " indices"]:
        """Mean of what is rounded to each index, less the index."""
        return (self.sums / self.counts.clamp_min(1))[:, :-1][self.known[:, :-1]]

    def distortion(self) -> float:
        """Mean squared error of a token, summed over its channels, where each index stands for its mean."""
        n_tokens = float(self.counts[0].sum())
        explained = float((self.sums.square() / self.counts.clamp_min(1)).sum()) / n_tokens
        return self.step**2 * (self.squares - explained)


def with_rate(deviation: Float32[Tensor, "tokens channels"], bits: float) -> IndexCounts:
    """Counts with the widest step that takes the bits per channel, found by bisection; the finest, if none takes them.

    Rates end where only few channels move: a finer step adds bits to those alone.
    """
    widest = float(deviation.abs().max())
    if widest == 0:
        return IndexCounts.of(deviation, 1.0)
    low, high = max(_FINEST * widest, _TINY), _WIDEST * widest
    while True:
        counted = IndexCounts.of(deviation, (low * high) ** 0.5)
        rate = counted.rate()
        if abs(rate - bits) <= _PRECISION * bits or high < low * (1 + _PRECISION):
            return counted
        low, high = (counted.step, high) if rate > bits else (low, counted.step)


def trade(deviation: Float32[Tensor, "tokens channels"], most_bits: float) -> tuple[tuple[float, float], ...]:
    """(distortion saved per bit, bits) of a token, as finer and finer steps bring them, up to a rate per channel.

    Beyond the rate of the finest step nothing is saved.
    """
    deviation = deviation[:_CURVE_TOKENS]
    widest, points = float(deviation.abs().max()), list[tuple[float, float]]()
    for step in _falling_steps(widest):
        counted = IndexCounts.of(deviation, step)
        points.append((counted.rate(), counted.distortion()))
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
    return [step for step in steps if step >= _TINY]
