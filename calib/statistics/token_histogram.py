"""Histogram of values normalised by the range of their token, for per-token codebooks."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Shaped
from torch import Tensor

from calib.statistics.loops import count_tokens
from calib.statistics.statistic import Statistic, adopt_device, check_weights

OUTLIER_FRACTIONS = (0.0, 0.005, 0.01, 0.02, 0.05)


class TokenHistogram(Statistic):
    """Histogram of (x - middle) / half_range over [-1, 1], for several outlier fractions removed per token.

    Parameters
    ----------
    channels : int
        Channels of a token.
    bins : int
        Bins over [-1, 1].
    dtype : torch.dtype
        int64 for counts, float64 for sums of weights.
    fractions : sequence of float
        Outlier fractions.
    """

    STATE = ("counts", "weights")

    def __init__(
        self,
        channels: int,
        bins: int = 4096,
        dtype: torch.dtype = torch.int64,
        fractions: Sequence[float] = OUTLIER_FRACTIONS,
    ) -> None:
        self.channels, self.bins, self.fractions = channels, bins, fractions
        self.counts = torch.zeros(len(fractions), bins, dtype=dtype)
        self.weights = torch.zeros(len(fractions), bins, dtype=torch.float64)

    def update(
        self, x: Float[Tensor, "tokens channels"], weights: Float64[Tensor, "tokens channels"] | None = None
    ) -> None:
        """Accumulates finite tokens; without weights every value counts as one."""
        check_weights(self, weights, self.counts)
        if x.shape[0] == 0:
            return
        adopt_device(self, x.device)
        wide = x.float()
        if wide.is_cuda:
            self._count_by_torch(wide, weights)
        else:
            values, own = wide.contiguous().numpy(), None if weights is None else weights.contiguous().numpy()
            state, fractions = (self.counts.numpy(), self.weights.numpy()), np.array(self.fractions, dtype=float)
            count_tokens(np.sort(values, axis=1), values, own, fractions, *state)  # torch sorts many times slower

    def _count_by_torch(self, x: Tensor, weights: Tensor | None) -> None:
        ordered = x.sort(dim=1).values
        for row, fraction in enumerate(self.fractions):
            counts, spread = _histogram(x, weights, _inner_range(ordered, fraction), self.bins)
            self.counts[row] += counts
            self.weights[row] += spread

    def merge(self, other: "TokenHistogram") -> None:
        """Adds the counts of another histogram."""
        self.counts += other.counts
        self.weights += other.weights

    def centers(self) -> Float64[Tensor, " bins"]:
        """Centre of each bin, in half-ranges."""
        return bin_centers(self.bins, self.counts.device)


def bin_centers(bins: int, device: torch.device) -> Float64[Tensor, " bins"]:
    """Centres of equal bins over [-1, 1]."""
    return (torch.arange(bins, dtype=torch.float64, device=device) + 0.5) * (2 / bins) - 1


def token_histogram(
    x: Float32[Tensor, "tokens channels"],
    fraction: float,
    bins: int,
    weights: Float64[Tensor, "tokens channels"] | None = None,
) -> tuple[Shaped[Tensor, " bins"], Float64[Tensor, " bins"]]:
    """Counts, and counts times the squared half-range of the token, of all values but the outliers.

    With weights, their sums in place of the counts.
    """
    dtype = torch.int64 if weights is None else torch.float64
    histogram = TokenHistogram(x.shape[1], bins, dtype, [fraction])
    histogram.update(x, weights)
    return histogram.counts[0], histogram.weights[0]


def _inner_range(
    ordered: Float32[Tensor, "tokens channels"], fraction: float
) -> tuple[Float32[Tensor, "tokens 1"], Float32[Tensor, "tokens 1"]]:
    """Smallest and largest value of each token that is no outlier under the percentile rule.

    Where all are outliers, the largest is not above the smallest.
    """
    # The rule of `PercentileSparse`: values at or beyond the interpolated percentiles are outliers. Counting them in
    # the sorted token gives the places of the first and last value inside.
    last = ordered.shape[1] - 1
    if fraction == 0:
        return ordered[:, :1], ordered[:, last:]
    position = fraction / 2 * last
    first, part = int(position), position - int(position)
    second = min(first + 1, last)
    lower = torch.lerp(ordered[:, first, None], ordered[:, second, None], part)
    upper = torch.lerp(ordered[:, -1 - first, None], ordered[:, -1 - second, None], part)
    n_small = (ordered <= lower).sum(dim=1, keepdim=True)
    n_large = (ordered >= upper).sum(dim=1, keepdim=True)
    return ordered.gather(1, n_small.clamp(max=last)), ordered.gather(1, (last - n_large).clamp(min=0))


def _histogram(
    x: Float32[Tensor, "tokens channels"],
    weights: Float64[Tensor, "tokens channels"] | None,
    inner: tuple[Tensor, Tensor],
    bins: int,
) -> tuple[Shaped[Tensor, " bins"], Float64[Tensor, " bins"]]:
    low, high = inner
    half_range = ((high - low) / 2).clamp_min(0)
    left_out = (x < low) | (x > high) | (half_range <= 0)
    # a = (x - middle) / half_range in [-1, 1] falls into bin (a + 1) * bins / 2 = (x - low) * bins / (2 half_range).
    place = (x - low) * (bins / 2 / half_range)
    # A range of a few denormals has no finite inverse: what is not a number belongs to the first bin.
    place = torch.where(place > 0, place, 0).clamp_(max=bins - 1)
    index = place.masked_fill_(left_out, bins).int().reshape(-1)
    squares = half_range.double().square().expand_as(x)
    # (x - x')^2 = half_range^2 (a - a')^2: weights times half_range^2 make a codebook of a minimise the error of x.
    flat = (None, squares) if weights is None else (weights, weights * squares)
    counts, spread = (
        torch.bincount(index, None if part is None else part.reshape(-1), minlength=bins + 1)[:bins] for part in flat
    )
    return counts, spread
