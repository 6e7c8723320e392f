"""One step for all channels, as wide as a rate allows, and tables of frequencies for the indices."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float32, Float64, Int16
from pydantic import Field
from torch import Tensor

from artifacts.entropy_coded import EntropyCoded, mean_entropy
from artifacts.frequency_coder import TOTAL
from artifacts.quantizer import Quantizer
from calib.estimators.estimator import Estimator, Fit
from calib.statistics.site_statistics import SiteShape, SiteStatistics

_REACH = 512
"""Tables go no further than this on either side of the index zero; what lies beyond is escaped."""

_PRIOR = 0.5
"""Occurrences of every index, and of the escape symbol, that are added to those that were counted."""

_STREAM_BITS = 48
"""About what a stream takes besides its indices: its length, and half a word at its end."""

_GROUP_ELEMENTS = 2**15
"""Of the tokens that share a stream, whose end costs two thousandths of a bit then."""

_ESCAPE_BITS = 8.0
"""About what follows an escape symbol: 5 bits, and those of a distance of a few indices."""

_FINEST = 2.0**-20
"""Finest step, in largest deviations."""

_PRECISION = 1e-3
"""Of the rate."""


@final
class EntropyCodedEstimator(Estimator):
    """The step with which the tokens of the reservoir take the given rate.

    Parameters
    ----------
    bits : float
        Mean bits per channel of whole groups, their streams' ends included, 0.01 to 8.
    centroids : float
        How far what an index stands for lies from the middle of what is rounded to it, at 0, to its mean, at 1. The
        mean has the least squared error; but it makes keys and values shorter, and a model reads them worse for it.
    group_tokens : int or None
        Tokens that share a stream. A cache keeps them exact until they are that many; fewer cost more bits for the ends
        of streams, and more time. None takes 64 for 512 channels and more, and up to 256 for fewer.
    """

    method: Literal["entropy"] = "entropy"
    bits: float = Field(default=1.0, ge=0.01, le=8)
    centroids: float = Field(default=0.5, ge=0, le=1)
    group_tokens: int | None = Field(default=None, ge=1)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads the token reservoir."""
        rows = statistics.rows.cpu()
        offset = rows.double().mean(dim=0).float()
        group_tokens = self.group_tokens or min(256, max(64, _GROUP_ELEMENTS // rows.shape[1]))
        counted = _with_rate(rows - offset, self._index_bits(statistics.shape, group_tokens))
        first, n_indices, frequencies = counted.tables()
        quantizer = EntropyCoded(
            channels=rows.shape[1],
            bits=mean_entropy(frequencies, rows.shape[1]),
            group_tokens=group_tokens,
            step=torch.full((1,), counted.step),
            offset=offset,
            first=first,
            n_indices=n_indices,
            frequencies=frequencies,
            shifts=(self.centroids * counted.shifts()).half() if self.centroids else None,
        )
        return Fit(quantizer, f"reservoir of {len(rows)} tokens")

    def _index_bits(self, shape: SiteShape, group_tokens: int) -> float:
        """What is left of the bits for indices."""
        ends = _STREAM_BITS / (group_tokens * shape.channels)
        if self.bits <= ends:
            raise ValueError(
                f"{shape.site}: streams of {group_tokens} tokens of {shape.channels} channels take {ends:.3g} bits"
                f" per channel for their ends alone; got bits={self.bits}. Raise bits or group_tokens."
            )
        return self.bits - ends

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """There is none: frequencies are counted."""
        raise ValueError("frequencies of indices are counted; calibrate first")


@dataclass(frozen=True, eq=False)
class _Counted:
    """How often each index occurs with a step, for indices from -_REACH to _REACH and, last, all others.

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
    def of(cls, deviation: Float32[Tensor, "tokens channels"], step: float) -> "_Counted":
        """Counts the tokens."""
        step = float(torch.tensor(step).clamp_min(torch.finfo(torch.float32).tiny))
        n_channels, n_symbols = deviation.shape[1], 2 * _REACH + 2
        a = (deviation / step).T
        index = a.round()
        symbol = torch.where(index.abs() <= _REACH, index + _REACH, n_symbols - 1).long()
        flat = (symbol + n_symbols * torch.arange(n_channels)[:, None]).flatten()
        counts, sums = (
            torch.bincount(flat, weights, minlength=n_channels * n_symbols).double().view(n_channels, n_symbols)
            for weights in (None, (a - index).flatten().double())
        )
        return cls(step, counts, sums)

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
        bits[:, -1] += _ESCAPE_BITS
        return float((self.counts * bits).sum() / self.counts.sum())

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


def _with_rate(deviation: Float32[Tensor, "tokens channels"], bits: float) -> _Counted:
    """Counts with the widest step that takes the bits, found by bisection."""
    widest = float(deviation.abs().max())
    if widest == 0:
        return _Counted.of(deviation, 1.0)
    low, high = _FINEST * widest, 4 * widest
    while True:
        counted = _Counted.of(deviation, (low * high) ** 0.5)
        rate = counted.rate()
        if abs(rate - bits) <= _PRECISION * bits or high < low * (1 + _PRECISION):
            return counted
        low, high = (counted.step, high) if rate > bits else (low, counted.step)
