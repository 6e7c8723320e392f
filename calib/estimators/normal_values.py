"""Values of static channels on a common scale: what codebooks are fitted to."""

from typing import NamedTuple

import torch
from jaxtyping import Float16, Float32, Float64, Int64
from torch import Tensor

from calib.estimators.ranges import Ranges, ThresholdDtype
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.token_histogram import bin_centers

_TINY = torch.finfo(torch.float64).tiny

_ROUNDING = 1e-4
"""Of a bin's middle, in half-ranges, where a channel lies far from zero."""

Histogram = tuple[Float64[Tensor, "tables bins"], Float64[Tensor, "tables bins"]]
"""Centres and weights of bins over [-1, 1]."""


class NormalValues(NamedTuple):
    """Normalised values, each with its channel and with the weight that it stands for."""

    channel: Int64[Tensor, " values"]
    a: Float32[Tensor, " values"]
    weights: Float64[Tensor, " values"]


def normalisation(
    ranges: Ranges, dtype: ThresholdDtype
) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
    """Half-range and middle of each channel, in the arithmetic of the thresholds."""
    low, high = (end.half() if dtype == "float16" else end for end in (ranges.low, ranges.high))
    scale, offset = ((high - low) / 2).float(), ((high + low) / 2).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale)), offset


def normal_values(
    statistics: SiteStatistics, ranges: Ranges, scale_offset: tuple[Tensor, Tensor], step: float, *, fisher: bool
) -> tuple[NormalValues, int]:
    """(x - offset) / scale within the ranges, and how many channels came from the reservoir.

    Constant channels have none. The middle of a bin that holds an end of the range may lie beyond it: what is in the
    bin counts at the end. Channels whose bins are wider than `step` half-ranges are read from the token reservoir.

    Parameters
    ----------
    statistics : SiteStatistics
        Of the site.
    ranges : Ranges
        Values outside are left out.
    scale_offset : pair of Float32[Tensor, "channels"]
        See `normalisation`.
    step : float
        Coarsest bin, in half-ranges.
    fisher : bool
        Each value has the weight of its squared gradients instead of one.
    """
    scale, offset = scale_offset
    histogram = statistics.fisher_histogram if fisher else statistics.histogram
    width = histogram.width().cpu()
    coarse = (width > step * scale) & ~ranges.constant
    channel, x, counts = (part.cpu() for part in histogram.occupied())
    a = (x - _take(offset, channel)) / _take(scale, channel)
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
    """One histogram over [-1, 1] for each table, with the mean of what fell into a bin as its centre.

    `values.channel` holds the table of each value.
    """
    index = ((values.a + 1) * (bins / 2)).clamp_(0, bins - 1).long() + values.channel * bins
    size = tables * bins
    total = torch.bincount(index, values.weights, minlength=size).double().view(tables, bins)  # integers where empty
    sums = torch.bincount(index, values.weights * values.a, minlength=size).view(tables, bins)
    return torch.where(total > 0, sums / total.clamp_min(_TINY), bin_centers(bins, total.device)), total


def or_middle(histogram: Histogram) -> Histogram:
    """The histogram; one value at the middle where it is empty, because all channels are constant."""
    centers, total = histogram
    total[:, total.shape[1] // 2] += total.sum(dim=1) == 0
    return centers, total


def pooled(histogram: Histogram, pooling: float) -> Histogram:
    """Each channel's histogram with a share of the average shape added; constant channels get the average."""
    centers, weights = histogram
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
    """Scale and offset with which the level nearest zero gives a constant channel back without rounding.

    The scale is a power of two far below the constant's last bit, so that scale * level is exact and vanishes beside
    it; for the constant zero the offset cancels it.
    """
    scale, offset = scale_offset
    _, exponent = torch.frexp(ranges.low)
    tiny = torch.ldexp(torch.ones_like(scale), (exponent - 40).clamp_min(-100))
    cancelled = torch.where(ranges.low == 0, -tiny * nearest_zero.float(), ranges.low)
    return torch.where(ranges.constant, tiny, scale), torch.where(ranges.constant, cancelled, offset)


def _inside(channel: Tensor, a: Tensor, weights: Tensor, slack: Float32[Tensor, " channels"]) -> NormalValues:
    """What lies in [-1, 1]; beyond by no more than its channel's slack, at the end."""
    inside = a.abs() <= 1 + _take(slack, channel)
    return NormalValues(channel, a.clamp(-1, 1), weights.double() * inside)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)
