"""Static ranges of channels, with or without their outliers."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from calib.statistics.site_statistics import SiteStatistics

ThresholdDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Ranges:
    """Range of each channel, and its provenance.

    Parameters
    ----------
    low, high : Float32[Tensor, "channels"]
        Ends of the range, in units of x.
    source : str
        Exact statistics, or the histogram if the tails are not deep enough.
    """

    low: Float32[Tensor, " channels"]
    high: Float32[Tensor, " channels"]
    source: str

    @property
    def constant(self) -> Tensor:
        """True for channels with a single value."""
        return self.low == self.high

    def union(self, width: int) -> "Ranges":
        """Common range of each `width` neighbouring channels, the union of theirs."""
        low, high = (end.view(-1, width) for end in (self.low, self.high))
        low, high = low.amin(dim=1).repeat_interleave(width), high.amax(dim=1).repeat_interleave(width)
        return Ranges(low, high, self.source)

    def shrunk(self, ratios: Float32[Tensor, " channels"]) -> "Ranges":
        """Ranges clipped around their middles by a ratio; those with a ratio of 1 are unchanged to the last bit."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2 * ratios
        low, high = torch.where(ratios < 1, middle - half, self.low), torch.where(ratios < 1, middle + half, self.high)
        return Ranges(low, high, self.source)


def channel_ranges(statistics: SiteStatistics, outlier_fraction: float, dtype: ThresholdDtype = "float32") -> Ranges:
    """Ranges by minimum and maximum, or by percentiles that exclude `outlier_fraction`, half on each side.

    Parameters
    ----------
    statistics : SiteStatistics
        Statistics of the site.
    outlier_fraction : float
        Fraction outside the range, from 0.
    dtype : {'float32', 'float16'}
        Precision to which the ends are rounded first.
    """
    # Exact order statistics as far as the tails are deep (512 per side), else the histogram.
    tail = outlier_fraction / 2
    exact = statistics.tails.covers(tail)
    low, high = (statistics.tails if exact else statistics.histogram).quantiles(tail)
    source = "exact statistics" if exact else "channel histogram, to half a bin"
    if dtype == "float16":
        low, high = _rounded(low, high)
    return Ranges(low.cpu().float(), high.cpu().float(), source)


def _rounded(low: Float32[Tensor, " channels"], high: Float32[Tensor, " channels"]) -> tuple[Tensor, Tensor]:
    """Ends in float16, except where the range would become empty: a constant keeps its value."""
    left, right = low.half().float(), high.half().float()
    return torch.where(left < right, left, low), torch.where(left < right, right, high)


def constant_step(low: Float32[Tensor, " channels"]) -> Float32[Tensor, " channels"]:
    """Step that divides a constant exactly: its last bit, or 1 for zero.

    Offsets of a few such steps, and sums with them, are exact in float32, so any code can represent the constant.
    """
    # frexp: |low| = m * 2^e with 1/2 <= m < 1 and 24 bits of m, so the last bit is 2^(e - 24); 2^-126 is the least
    # normal number.
    last_bit = torch.ldexp(torch.ones_like(low), (torch.frexp(low).exponent - 24).clamp_min(-126))
    return torch.where(low == 0, torch.ones_like(low), last_bit)
