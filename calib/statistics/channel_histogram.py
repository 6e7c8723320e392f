"""Histogram per channel that widens with the data and does not depend on their order."""

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64, Shaped
from torch import Tensor

from calib.statistics.loops import coarsen, count_channels
from calib.statistics.statistic import Statistic, adopt_device, check_weights

_SIGNIFICANT_BITS = 28
"""Bits of a bin number: the bin width is at least 2^-28 of the largest magnitude."""


class ChannelHistogram(Statistic):
    """Counts, or sums of weights, per channel in `bins` bins of a power-of-two width, with edges at multiples of it.

    The width is the smallest with which the bins span the minimum and maximum of the channel, so it depends on the data
    alone; when it doubles, pairs of neighbouring bins add up exactly.

    Parameters
    ----------
    channels : int
        Channels of a token.
    bins : int
        Bins per channel; between half and all of them lie within the range.
    dtype : torch.dtype
        int32 for counts, float64 for sums of weights; the bins are the same.
    """

    STATE = ("minimum", "maximum", "exponent", "first", "counts")

    def __init__(self, channels: int, bins: int = 2048, dtype: torch.dtype = torch.int32) -> None:
        self.bins = bins
        self.minimum = torch.full((channels,), torch.inf)
        self.maximum = torch.full((channels,), -torch.inf)
        self.exponent = torch.full((channels,), -200, dtype=torch.int32)
        self.first = torch.zeros(channels, dtype=torch.int32)
        self.counts = torch.zeros(channels, bins, dtype=dtype)

    def update(
        self, x: Float[Tensor, "tokens channels"], weights: Float64[Tensor, "tokens channels"] | None = None
    ) -> None:
        """Accumulates finite tokens; without weights every value counts as one."""
        check_weights(self, weights, self.counts)
        if x.shape[0] == 0:
            return
        adopt_device(self, x.device)
        wide = x.float()
        self._widen(wide.amin(dim=0), wide.amax(dim=0))
        if wide.is_cuda:
            self._count_by_torch(wide, weights)
        else:
            columns, own = wide.T.contiguous().numpy(), None if weights is None else weights.T.contiguous().numpy()
            # 1 / 2^e is exact, so that the compiled product and the division by torch give the same bins.
            state = (1 / self.width(), self.first, self.counts)
            count_channels(columns, own, *(tensor.numpy() for tensor in state))

    def merge(self, other: "ChannelHistogram") -> None:
        """Adds the counts of another histogram."""
        if not torch.isfinite(other.minimum).all():
            return
        self._widen(other.minimum, other.maximum)
        counts = other.counts.clone()
        _coarsen(counts, other.first, other.exponent, self.first, self.exponent)
        self.counts += counts

    def centers(self) -> Float32[Tensor, "channels bins"]:
        """Centre of each bin, in units of x."""
        index = self.first[:, None] + torch.arange(self.bins, dtype=torch.int32, device=self.first.device)
        return torch.ldexp(index.float() + 0.5, self.exponent[:, None])

    def occupied(
        self,
    ) -> tuple[Int64[Tensor, " occupied"], Float32[Tensor, " occupied"], Shaped[Tensor, " occupied"]]:
        """Channel, centre in units of x, and count of every non-empty bin, ascending by channel and value."""
        where = torch.from_numpy(np.flatnonzero((self.counts > 0).cpu().numpy())).to(self.counts.device)
        channels = torch.arange(len(self.counts) + 1, device=where.device)
        per_channel = torch.searchsorted(where, channels * self.bins).diff()
        channel = channels[:-1].repeat_interleave(per_channel)
        origin = (self.first - channels[:-1] * self.bins).repeat_interleave(per_channel)
        centers = ((where + origin).float() + 0.5) * self.width().repeat_interleave(per_channel)
        return channel, centers, self.counts.view(-1).index_select(0, where)

    def width(self) -> Float32[Tensor, " channels"]:
        """Width of the bins, in units of x."""
        return torch.ldexp(torch.ones_like(self.minimum), self.exponent)

    def quantiles(self, tail: float) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
        """Quantiles `tail` and `1 - tail` of each channel, exact to half a bin."""
        cumulative = self.counts.cumsum(dim=1)
        total = cumulative[:, -1:]
        centers = self.centers()
        found = []
        for p in (tail, 1 - tail):
            bins = torch.searchsorted(cumulative, (total * p).long() + 1).clamp_(max=self.bins - 1)
            found.append(centers.gather(1, bins)[:, 0].clamp(self.minimum, self.maximum))
        return found[0], found[1]

    def _count_by_torch(self, x: Tensor, weights: Tensor | None) -> None:
        rows = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) * self.bins
        flat = (x / self.width()).floor_().int().add_(rows - self.first).view(-1)
        flat_weights = None if weights is None else weights.reshape(-1)
        self.counts += torch.bincount(flat, flat_weights, minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        # Width and first bin are functions of the range alone: the state after all tokens does not depend on their
        # order or on the sharding.
        minimum, maximum = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        exponent = _smallest_exponent(minimum, maximum, self.bins)
        first = torch.floor(torch.ldexp(minimum, -exponent)).to(torch.int32)
        _coarsen(self.counts, self.first, self.exponent, first, exponent)
        self.minimum, self.maximum, self.exponent, self.first = minimum, maximum, exponent, first


def _smallest_exponent(low: Tensor, high: Tensor, bins: int) -> Int32[Tensor, " channels"]:
    """Least e such that low and high lie within `bins` bins of width 2^e."""
    # The range touches between span / w and span / w + 2 bins, depending on where its ends fall: start from a width
    # below span / bins and double it until all fit. Numerically, bin numbers have at most 28 bits.
    magnitude = _exponent(torch.maximum(low.abs(), high.abs()))
    span = _exponent(high.double() - low.double())
    exponent = torch.maximum(magnitude - _SIGNIFICANT_BITS, span - bins.bit_length() - 1).clamp_min(-120)
    for _ in range(4):
        fits = torch.floor(torch.ldexp(high, -exponent)) - torch.floor(torch.ldexp(low, -exponent)) < bins
        exponent = torch.where(fits, exponent, exponent + 1)
    return exponent.to(torch.int32)


def _exponent(x: Tensor) -> Int32[Tensor, " channels"]:
    """Least e with x < 2^e; -200 for zero, below all others, so that e grows with the range."""
    return torch.where(x > 0, torch.frexp(x).exponent, -200)


def _coarsen(counts: Tensor, first: Tensor, exponent: Tensor, new_first: Tensor, new_exponent: Tensor) -> None:
    """Moves counts into bins that are wider by a power of two and start at another bin."""
    # floor(floor(x / w) / 2^s) = floor(x / (2^s w)): shifting a bin number gives the bin that a count in the wide bins
    # would have found, so that the histogram depends on the range alone and not on the way to it.
    shift = (new_exponent - exponent).clamp(0, 31)
    if counts.is_cuda:
        _coarsen_by_torch(counts, first, shift, new_first)
    else:
        coarsen(counts.numpy(), *(part.contiguous().numpy() for part in (first, shift, new_first)))


def _coarsen_by_torch(counts: Tensor, first: Tensor, shift: Tensor, new_first: Tensor) -> None:
    index = first[:, None] + torch.arange(counts.shape[1], dtype=torch.int32, device=counts.device)
    target = ((index >> shift[:, None]) - new_first[:, None]).clamp_(0, counts.shape[1] - 1)
    counts.copy_(torch.zeros_like(counts).scatter_add_(1, target.long(), counts))
