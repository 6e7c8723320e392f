"""Tables of levels by exact one-dimensional k-means."""

from typing import ClassVar, Literal, NamedTuple, final

import torch
from jaxtyping import Float16, Float32, Float64, Int64
from pydantic import Field, model_validator
from torch import Tensor

from artifacts.codebook import Codebook, DynamicCodebook
from artifacts.quantizer import Quantizer
from calib.estimators.estimator import EXACT, Estimator, Fit, Outliers
from calib.estimators.ranges import Ranges, ThresholdDtype, channel_ranges
from calib.kmeans import kmeans_1d
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.token_histogram import OUTLIER_FRACTIONS, bin_centers, token_histogram

_SITE_BINS = 4096
"""Bins over [-1, 1] for one table per site: within 1e-6 of the optimum for any number of values."""

_CHANNEL_BINS = 512
"""Bins over [-1, 1] for a table per channel."""

_FINEST_LEVEL_BINS = 4
"""Histogram bins per level, at least; coarser channels are fitted from the token reservoir."""

_TINY = torch.finfo(torch.float64).tiny

_ROUNDING = 1e-4
"""Of a bin's middle, in half-ranges, where a channel lies far from zero."""


_Histogram = tuple[Float64[Tensor, "tables bins"], Float64[Tensor, "tables bins"]]
"""Centres and weights of bins over [-1, 1]."""


class _Values(NamedTuple):
    """Normalised values, each with its channel and with the weight that it stands for."""

    channel: Int64[Tensor, " values"]
    a: Float32[Tensor, " values"]
    weights: Float64[Tensor, " values"]


@final
class CodebookEstimator(Estimator):
    """Levels that minimise the weighted squared error of the normalised values (arXiv 2401.18079, equation 7).

    Parameters
    ----------
    bits : int
        Code width, 1 to 8.
    per : {'channel', 'token'}
        Normalised by static ranges of the channels, or by each token's own range.
    tables : {'site', 'channel'}
        One table for all channels, or one for each.
    weights : {'none', 'scale2', 'query', 'query_scale2'}
        Every normalised value alike; or by the square of its channel's or token's half-range, which makes the error
        that of x itself; or by the energy of the queries that read the key channel, without gradients what Fisher
        weights measure; or by both.
    pooling : float
        With a table for each channel: weight of the site's average histogram relative to the channel's own, which
        gives rare values a say that few calibration tokens may not have shown.
    outliers : Outliers or None
        Values kept apart.
    threshold_dtype : {'float32', 'float16'}
        Precision of the static range's ends.
    """

    needs: ClassVar[tuple[str, ...]] = ("tails", "histogram", "token_histogram")

    method: Literal["codebook"] = "codebook"
    bits: int = Field(default=4, ge=1, le=8)
    per: Literal["channel", "token"] = "channel"
    tables: Literal["site", "channel"] = "site"
    weights: Literal["none", "scale2", "query", "query_scale2"] = "scale2"
    pooling: float = Field(default=0.1, ge=0, le=1)
    outliers: Outliers | None = None
    threshold_dtype: ThresholdDtype = "float32"

    @model_validator(mode="after")
    def _possible(self) -> "CodebookEstimator":
        if self.per == "token" and self.tables == "channel":
            raise ValueError("a range per token goes with one table per site; use tables: site, or per: channel")
        if self.per == "token" and self.weights.startswith("query"):
            raise ValueError("query weights belong to key channels; with per: token use weights: scale2 or none")
        return self

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads ranges and histograms; the token reservoir where those are too coarse."""
        return self._fit_tokens(statistics) if self.per == "token" else self._fit_channels(statistics)

    def dynamic(self, channels: int) -> Quantizer:
        """There is none: levels are fitted."""
        raise ValueError("codebooks are fitted; calibrate first: calibrate MODEL --nuq --quantizer-path q.safetensors")

    @property
    def _fraction(self) -> float:
        return self.outliers.fraction if self.outliers else 0.0

    def _fit_tokens(self, statistics: SiteStatistics) -> Fit:
        channels = statistics.shape.channels
        histogram = statistics.token_histogram
        if self._fraction in OUTLIER_FRACTIONS:
            row = OUTLIER_FRACTIONS.index(self._fraction)
            counts, weighted, source = histogram.counts[row], histogram.weights[row], EXACT
        else:
            rows = statistics.rows
            counts, weighted = token_histogram(rows, self._fraction, histogram.bins)
            source = f"reservoir of {len(rows)} tokens"
        weights = weighted if self.weights == "scale2" else counts.double()
        if not weights.any():  # every token is a constant: any levels do
            weights = torch.ones_like(weights)
        levels = _levels(bin_centers(histogram.bins, weights.device)[None], weights[None], self.bits)
        inner = DynamicCodebook(channels=channels, bits=self.bits, levels=levels)
        return Fit(self.outliers.wrap(inner, None) if self.outliers else inner, source)

    def _fit_channels(self, statistics: SiteStatistics) -> Fit:
        ranges = channel_ranges(statistics, self._fraction, self.threshold_dtype)
        scale, offset = _normalisation(ranges, self.threshold_dtype)
        values, n_coarse = self._normal_values(statistics, ranges, scale, offset)
        if self.tables == "site":
            weights = values.weights * _take(self._channel_weights(statistics, scale), values.channel)
            histogram = _or_middle(_rebin(_Values(torch.zeros_like(values.channel), values.a, weights), 1, _SITE_BINS))
        else:
            histogram = _pooled(_rebin(values, len(scale), _CHANNEL_BINS), self.pooling)
        levels = _levels(*histogram, self.bits)
        scale, offset = _exact_constants(scale, offset, levels, ranges)
        inner = Codebook(channels=len(scale), bits=self.bits, scale=scale, offset=offset, levels=levels)
        source = ranges.source if not n_coarse else f"{ranges.source}; reservoir for {n_coarse} channels"
        return Fit(self.outliers.wrap(inner, ranges) if self.outliers else inner, source)

    def _normal_values(
        self, statistics: SiteStatistics, ranges: Ranges, scale: Tensor, offset: Tensor
    ) -> tuple[_Values, int]:
        """(x - offset) / scale within the ranges, and how many channels came from the reservoir.

        Constant channels have none. The middle of a bin that holds an end of the range may lie beyond it: what is in
        the bin counts at the end.
        """
        width = statistics.histogram.width().cpu()
        coarse = (width * 2**self.bits * _FINEST_LEVEL_BINS > 2 * scale) & ~ranges.constant
        channel, x, counts = (part.cpu() for part in statistics.histogram.occupied())
        a = (x - _take(offset, channel)) / _take(scale, channel)
        slack = (width / (2 * scale) + _ROUNDING).masked_fill(coarse | ranges.constant, -torch.inf)
        values = _inside(channel, a, counts, slack)
        if coarse.any():
            rows = ((statistics.rows.cpu() - offset) / scale).T[coarse]
            channel = coarse.nonzero().expand_as(rows).flatten()
            more = _inside(channel, rows.flatten(), torch.ones(rows.numel()), torch.zeros_like(slack))
            values = _Values(*(torch.cat(parts) for parts in zip(values, more, strict=True)))
        return values, int(coarse.sum())

    def _channel_weights(self, statistics: SiteStatistics, scale: Float32[Tensor, " channels"]) -> Tensor:
        weights = torch.ones(len(scale), dtype=torch.float64)
        if self.weights.startswith("query"):
            if statistics.query_energy is None:
                raise ValueError(
                    f"{statistics.shape.site}: weights: {self.weights} needs the queries that read this site; there "
                    "are none for values. Use weights: scale2 or none."
                )
            weights = statistics.query_energy
        return weights * scale.double().square() if self.weights.endswith("scale2") else weights


def _normalisation(
    ranges: Ranges, dtype: ThresholdDtype
) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
    """Half-range and middle of each channel, in the arithmetic of the thresholds."""
    low, high = (end.half() if dtype == "float16" else end for end in (ranges.low, ranges.high))
    scale, offset = ((high - low) / 2).float(), ((high + low) / 2).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale)), offset


def _exact_constants(
    scale: Float32[Tensor, " channels"],
    offset: Float32[Tensor, " channels"],
    levels: Float16[Tensor, "tables levels"],
    ranges: Ranges,
) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
    """Scale and offset with which the level nearest zero gives a constant channel back without rounding.

    The scale is a power of two far below the constant's last bit, so that scale * level is exact and vanishes beside
    it; for the constant zero the offset cancels it.
    """
    nearest = levels.float().gather(1, levels.float().abs().argmin(dim=1, keepdim=True))[:, 0].expand_as(scale)
    _, exponent = torch.frexp(ranges.low)
    tiny = torch.ldexp(torch.ones_like(scale), (exponent - 40).clamp_min(-100))
    offset = torch.where(ranges.constant, torch.where(ranges.low == 0, -tiny * nearest, ranges.low), offset)
    return torch.where(ranges.constant, tiny, scale), offset


def _inside(channel: Tensor, a: Tensor, weights: Tensor, slack: Float32[Tensor, " channels"]) -> _Values:
    """What lies in [-1, 1]; beyond by no more than its channel's slack, at the end."""
    inside = a.abs() <= 1 + _take(slack, channel)
    return _Values(channel, a.clamp(-1, 1), weights.double() * inside)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def _rebin(values: _Values, tables: int, bins: int) -> _Histogram:
    """One histogram over [-1, 1] for each table, with the mean of what fell into a bin as its centre."""
    index = ((values.a + 1) * (bins / 2)).clamp_(0, bins - 1).long() + values.channel * bins
    total = torch.bincount(index, values.weights, minlength=tables * bins).view(tables, bins)
    sums = torch.bincount(index, values.weights * values.a, minlength=tables * bins).view(tables, bins)
    return torch.where(total > 0, sums / total.clamp_min(_TINY), bin_centers(bins, total.device)), total


def _or_middle(histogram: _Histogram) -> _Histogram:
    """The histogram; one value at the middle where it is empty, because all channels are constant."""
    centers, total = histogram
    total[:, total.shape[1] // 2] += total.sum(dim=1) == 0
    return centers, total


def _pooled(histogram: _Histogram, pooling: float) -> _Histogram:
    """Each channel's histogram with a share of the average shape added; constant channels get the average."""
    centers, weights = histogram
    mass = weights.sum(dim=1, keepdim=True)
    shape = (weights / mass.clamp_min(1.0)).sum(dim=0) / (mass > 0).sum().clamp_min(1)
    shape[len(shape) // 2] += float(shape.sum() == 0)
    added = shape * torch.where(mass > 0, pooling * mass, 1.0)
    total = weights + added
    middles = bin_centers(weights.shape[1], weights.device)
    means = (centers * weights + middles * added) / total.clamp_min(_TINY)
    return torch.where(total > 0, means, middles), total


def _levels(centers: Float64[Tensor, "tables bins"], weights: Float64[Tensor, "tables bins"], bits: int) -> Tensor:
    return kmeans_1d(centers, weights, 2**bits).cpu().half()
