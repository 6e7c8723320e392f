"""A codebook for every channel, of as many levels as it deserves."""

from typing import Literal, final

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.mixed_codebook import MixedCodebook, mean_bits
from calib.estimators.estimator import Allowance, Estimator, Fit
from calib.estimators.normal_values import (
    Histogram,
    exact_constants,
    normal_values,
    normalisation,
    pooled,
    rebin,
)
from calib.estimators.ranges import channel_ranges
from calib.solvers.bit_allocation import LEVEL_COUNTS, allot, gains
from calib.solvers.kmeans import distortion_by_levels, kmeans_1d
from calib.statistics.site_statistics import SiteShape, SiteStatistics

_LEAST_BITS, _MOST_BITS = 0.25, 8.0

_BINS = 256
"""Bins over a channel's range."""

_EXACT_LEVELS = 32
"""Numbers of levels whose least distortion is computed; beyond, it is taken to fall with their square."""


@final
class AllottedEstimator(Estimator):
    """Levels go where they save most: each channel gets its own number of them and its own exact table.

    What counts is the squared error of x summed over the channels; behind a weighting rotation that is the weighted
    error of what was rotated.

    Parameters
    ----------
    bits : float
        Mean bits per channel, 0.25 to 8; counted in whole bytes of a token.
    pooling : float
        Weight of the average histogram in each channel's own, where its table is fitted; the allotment does without.
    """

    method: Literal["allotted"] = "allotted"
    bits: float = Field(default=2.5, ge=_LEAST_BITS, le=_MOST_BITS)
    pooling: float = Field(default=0.0, ge=0, le=1)

    @property
    def allowance(self) -> Allowance:
        """Whole bytes of a token."""
        return Allowance(unit_bits=8, least=_LEAST_BITS, most=_MOST_BITS)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads the histograms of the channels."""
        ranges = channel_ranges(statistics, 0.0)
        scale_offset = normalisation(ranges, "float32")
        values, _ = normal_values(statistics, ranges, scale_offset, torch.inf, fisher=False)
        centers, weights = rebin(values, len(ranges.low), _BINS)
        shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
        distortions = _distortions(centers, shares) * scale_offset[0].double().square()[:, None]
        counts = allot(distortions, self.bits)
        tables = _tables(pooled((centers, weights), self.pooling), counts)
        nearest = torch.stack([table[table.abs().argmin()] for table in tables])
        scale, offset = exact_constants(scale_offset, nearest, ranges)
        n_levels = torch.tensor(counts, dtype=torch.int16)
        quantizer = MixedCodebook(
            channels=len(scale),
            bits=mean_bits(n_levels),
            scale=scale,
            offset=offset,
            n_levels=n_levels,
            levels=torch.cat(tables),
        )
        return Fit(quantizer, ranges.source, trade=lambda: gains(distortions))

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """There is none: levels are fitted."""
        raise ValueError("levels are allotted by what was seen; calibrate first")


def _distortions(
    centers: Float64[Tensor, "channels bins"], shares: Float64[Tensor, "channels bins"]
) -> Float64[Tensor, "channels counts"]:
    """Least mean squared error of each channel with each of `LEVEL_COUNTS`, in half-ranges; zero for constants."""
    moving = shares.sum(dim=1) > 0
    exact = torch.zeros(len(centers), _EXACT_LEVELS, dtype=torch.float64)
    if moving.any():
        exact[moving] = distortion_by_levels(centers[moving], shares[moving], _EXACT_LEVELS)
    columns = [exact[:, n - 1] if n <= _EXACT_LEVELS else exact[:, -1] * (_EXACT_LEVELS / n) ** 2 for n in LEVEL_COUNTS]
    return torch.stack(columns, dim=1)


def _tables(histogram: Histogram, counts: list[int]) -> list[Tensor]:
    """The exact levels of each channel, fitted together with all channels that have as many."""
    tables: list[Tensor] = [torch.empty(0)] * len(counts)
    for n in sorted(set(counts)):
        chosen = [channel for channel, count in enumerate(counts) if count == n]
        levels = kmeans_1d(histogram[0][chosen], histogram[1][chosen], n).cpu().half()
        for channel, table in zip(chosen, levels, strict=True):
            tables[channel] = table
    return tables
