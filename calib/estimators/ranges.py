"""Where the bulk of each channel lies."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from calib.statistics.site_statistics import SiteStatistics

ThresholdDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Ranges:
    """Lower and upper end of each channel, and how they were found.

    Parameters
    ----------
    low, high : Float32[Tensor, "channels"]
        In units of x.
    source : str
        Exact statistics, or the histogram where the tails do not reach far enough.
    """

    low: Float32[Tensor, " channels"]
    high: Float32[Tensor, " channels"]
    source: str

    @property
    def constant(self) -> Tensor:
        """Channels that never change."""
        return self.low == self.high

    def shared(self, sharing: int) -> "Ranges":
        """One range for each `sharing` neighbouring channels, which holds theirs."""
        low, high = (end.view(-1, sharing) for end in (self.low, self.high))
        low, high = low.amin(dim=1).repeat_interleave(sharing), high.amax(dim=1).repeat_interleave(sharing)
        return Ranges(low, high, self.source)

    def shrunk(self, ratios: Float32[Tensor, " channels"]) -> "Ranges":
        """The same ranges, narrower around their middles; what is not narrowed stays to the last bit."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2 * ratios
        low, high = torch.where(ratios < 1, middle - half, self.low), torch.where(ratios < 1, middle + half, self.high)
        return Ranges(low, high, self.source)


def channel_ranges(statistics: SiteStatistics, outlier_fraction: float, dtype: ThresholdDtype = "float32") -> Ranges:
    """Minimum and maximum, or the percentiles that leave out `outlier_fraction`, half on each side.

    Parameters
    ----------
    statistics : SiteStatistics
        Of the site.
    outlier_fraction : float
        From 0.
    dtype : {'float32', 'float16'}
        What the ends are rounded to before anything is derived from them.
    """
    tail = outlier_fraction / 2
    exact = statistics.tails.covers(tail)
    low, high = (statistics.tails if exact else statistics.histogram).quantiles(tail)
    source = "exact statistics" if exact else "channel histogram, to half a bin"
    if dtype == "float16":
        low, high = _rounded(low, high)
    return Ranges(low.cpu().float(), high.cpu().float(), source)


def _rounded(low: Float32[Tensor, " channels"], high: Float32[Tensor, " channels"]) -> tuple[Tensor, Tensor]:
    """The ends in float16, except where no range would be left: a constant stays what it is."""
    left, right = low.half().float(), high.half().float()
    return torch.where(left < right, left, low), torch.where(left < right, right, high)


def constant_step(low: Float32[Tensor, " channels"]) -> Float32[Tensor, " channels"]:
    """A step of which the constant is a whole multiple: its last bit, or 1 for zero.

    Offsets of a few such steps and their sums are exact in float32, so any code can stand for the constant.
    """
    last_bit = torch.ldexp(torch.ones_like(low), (torch.frexp(low).exponent - 24).clamp_min(-126))
    return torch.where(low == 0, torch.ones_like(low), last_bit)
