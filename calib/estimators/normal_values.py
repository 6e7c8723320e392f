"""Normalised values and histograms, to which codebooks of static channels are fitted."""

from typing import NamedTuple

import torch
from jaxtyping import Float16, Float32, Float64, Int64
from torch import Tensor

from calib.estimators.ranges import Ranges, ThresholdDtype
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.token_histogram import bin_centers

_TINY = torch.finfo(torch.float64).tiny

_ROUNDING = 1e-4
"""Rounding error of a bin centre, in half-ranges, for channels far from zero."""

Histogram = tuple[Float64[Tensor, "tables bins"], Float64[Tensor, "tables bins"]]
"""Centres and weights of bins over [-1, 1]."""


class NormalValues(NamedTuple):
    """Normalised values with their channels and weights."""

    channel: Int64[Tensor, " values"]
    a: Float32[Tensor, " values"]
    weights: Float64[Tensor, " values"]


def normalisation(
    ranges: Ranges, dtype: ThresholdDtype
) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
    """Half-range and midpoint of each channel, in the precision of the thresholds."""
    low, high = (end.half() if dtype == "float16" else end for end in (ranges.low, ranges.high))
    scale, offset = ((high - low) / 2).float(), ((high + low) / 2).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale)), offset


def normal_values(
    statistics: SiteStatistics, ranges: Ranges, scale_offset: tuple[Tensor, Tensor], step: float, *, fisher: bool
) -> tuple[NormalValues, int]:
    """Values (x - offset) / scale within the ranges, and the number of channels from the token reservoir.

    Constant channels have none. The bin of an end of the range may have its centre beyond it and then counts at the
    end. Channels whose bins are wider than `step` half-ranges are taken from the token reservoir.

    Parameters
    ----------
    statistics : SiteStatistics
        Statistics of the site.
    ranges : Ranges
        Values outside are left out.
    scale_offset : pair of Float32[Tensor, "channels"]
        See `normalisation`.
    step : float
        Coarsest bin, in half-ranges.
    fisher : bool
        Weight values by squared gradients rather than by one.
    """
    scale, offset = scale_offset
    histogram = statistics.fisher_histogram if fisher else statistics.histogram
    width = histogram.width().cpu()
    coarse = (width > step * scale) & ~ranges.constant
    channel, x, counts = (part.cpu() for part in histogram.occupied())
    a = (x - _take(offset, channel)) / _take(scale, channel)
    # Bins are known by their centres: one that contains an end of the range reaches half a width beyond it.
    slack = (width / (2 * scale) + _ROUNDING).masked_fill(coarse | ranges.constant, -torch.inf)
    values = _inside(channel, a, counts, slack)
    if coarse.any():
        rows = ((statistics.rows.cpu() - offset) / scale).T[coarse]
        weights = statistics.row_gradients.cpu().double().square().T[coarse] if fisher else torch.ones(rows.shape)
        channel = coarse.nonzero().expand_as(rows).flatten()
        more = _inside(channel, rows.flatten(), weights.flatten(), torch.zeros_like(slack))
        values = NormalValues(*(torch.cat(parts) for parts in zip(values, more, strict=True)))
    return values, int(coarse.sum())


def rebin(values: NormalValues, tables: int, bins: int) -> Histogram:
    """One histogram over [-1, 1] per codebook, with the weighted mean of each bin as its centre.

    `values.channel` holds the codebook of each value.
    """
    # With exact means as centres, the k-means error of any interval of whole bins is exact up to a constant, the
    # variance within the bins.
    index = ((values.a + 1) * (bins / 2)).clamp_(0, bins - 1).long() + values.channel * bins
    size = tables * bins
    total = torch.bincount(index, values.weights, minlength=size).double().view(tables, bins)  # integers where empty
    sums = torch.bincount(index, values.weights * values.a, minlength=size).view(tables, bins)
    return torch.where(total > 0, sums / total.clamp_min(_TINY), bin_centers(bins, total.device)), total


def or_middle(histogram: Histogram) -> Histogram:
    """Histogram with one value at zero where it is empty, because all channels are constant."""
    centers, total = histogram
    total[:, total.shape[1] // 2] += total.sum(dim=1) == 0
    return centers, total


def pooled(histogram: Histogram, pooling: float) -> Histogram:
    """Histograms with a fraction of the average shape added to each; constant channels get the average."""
    centers, weights = histogram
    # Shrinkage of a histogram towards the mean of the normalised shapes, with `pooling` times its own mass as prior.
    mass = weights.sum(dim=1, keepdim=True)
    shape = (weights / mass.clamp_min(_TINY)).sum(dim=0) / (mass > 0).sum().clamp_min(1)
    shape[len(shape) // 2] += float(shape.sum() == 0)
    added = shape * torch.where(mass > 0, pooling * mass, 1.0)
    total = weights + added
    middles = bin_centers(weights.shape[1], weights.device)
    means = (centers * weights + middles * added) / total.clamp_min(_TINY)
    return torch.where(total > 0, means, middles), total


def exact_constants(
    scale_offset: tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]],
    nearest_zero: Float16[Tensor, " channels"],
    ranges: Ranges,
) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
    """Scale and offset with which the level nearest zero reproduces a constant channel exactly.

    The scale is a power of two far below the last bit of the constant, so that scale * level is exact and vanishes in
    the sum; for the constant zero the offset cancels it.
    """
    scale, offset = scale_offset
    _, exponent = torch.frexp(ranges.low)
    tiny = torch.ldexp(torch.ones_like(scale), (exponent - 40).clamp_min(-100))
    cancelled = torch.where(ranges.low == 0, -tiny * nearest_zero.float(), ranges.low)
    return torch.where(ranges.constant, tiny, scale), torch.where(ranges.constant, cancelled, offset)


def _inside(channel: Tensor, a: Tensor, weights: Tensor, slack: Float32[Tensor, " channels"]) -> NormalValues:
    """Values clamped to [-1, 1]; those beyond by more than the slack of their channel get weight zero."""
    inside = a.abs() <= 1 + _take(slack, channel)
    return NormalValues(channel, a.clamp(-1, 1), weights.double() * inside)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)
