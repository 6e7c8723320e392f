"""How values lie within their own token's range, which is what a per-token codebook is fitted to."""

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from calib.statistics.statistic import Statistic, adopt_device

OUTLIER_FRACTIONS = (0.0, 0.005, 0.01, 0.02, 0.05)


class TokenHistogram(Statistic):
    """Histogram of (x - middle) / half_range over [-1, 1], for a few shares of outliers left out per token.

    Parameters
    ----------
    channels : int
        Channels of a token.
    bins : int
        Bins over [-1, 1].
    """

    STATE = ("counts", "weights")

    def __init__(self, channels: int, bins: int = 4096) -> None:
        self.channels, self.bins = channels, bins
        self.counts = torch.zeros(len(OUTLIER_FRACTIONS), bins, dtype=torch.int64)
        self.weights = torch.zeros(len(OUTLIER_FRACTIONS), bins, dtype=torch.float64)

    def update(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Takes in finite tokens."""
        if x.shape[0] == 0:
            return
        adopt_device(self, x.device)
        ordered = _ascending(x.float())
        for row, fraction in enumerate(OUTLIER_FRACTIONS):
            counts, weights = _histogram(ordered, _apart(ordered, fraction), self.bins)
            self.counts[row] += counts
            self.weights[row] += weights

    def merge(self, other: "TokenHistogram") -> None:
        """Takes in what another statistic has seen."""
        self.counts += other.counts
        self.weights += other.weights

    def centers(self) -> Float64[Tensor, " bins"]:
        """Middle of each bin, in half-ranges."""
        return bin_centers(self.bins, self.counts.device)


def bin_centers(bins: int, device: torch.device) -> Float64[Tensor, " bins"]:
    """Middles of equal bins over [-1, 1]."""
    return (torch.arange(bins, dtype=torch.float64, device=device) + 0.5) * (2 / bins) - 1


def token_histogram(
    x: Float32[Tensor, "tokens channels"], fraction: float, bins: int
) -> tuple[Int64[Tensor, " bins"], Float64[Tensor, " bins"]]:
    """Counts, and counts weighted by the square of the token's half-range, of the values that are not kept apart."""
    ordered = _ascending(x)
    return _histogram(ordered, _apart(ordered, fraction), bins)


def _ascending(x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
    """Each token's values in order. On the CPU by numpy, whose sort is many times faster."""
    return x.sort(dim=1).values if x.is_cuda else torch.from_numpy(np.sort(x.numpy(), axis=1))


def _apart(
    ordered: Float32[Tensor, "tokens channels"], fraction: float
) -> tuple[Int64[Tensor, "tokens 1"], Int64[Tensor, "tokens 1"]]:
    """How many of each token's smallest and largest values the percentile rule keeps apart."""
    if fraction == 0:
        none = torch.zeros(len(ordered), 1, dtype=torch.int64, device=ordered.device)
        return none, none
    position = fraction / 2 * (ordered.shape[1] - 1)
    first, part = int(position), position - int(position)
    second = min(first + 1, ordered.shape[1] - 1)
    lower = torch.lerp(ordered[:, first, None], ordered[:, second, None], part)
    upper = torch.lerp(ordered[:, -1 - first, None], ordered[:, -1 - second, None], part)
    return (ordered <= lower).sum(dim=1, keepdim=True), (ordered >= upper).sum(dim=1, keepdim=True)


def _histogram(
    ordered: Float32[Tensor, "tokens channels"], apart: tuple[Tensor, Tensor], bins: int
) -> tuple[Int64[Tensor, " bins"], Float64[Tensor, " bins"]]:
    n_small, n_large = apart
    last = ordered.shape[1] - 1
    low, high = ordered.gather(1, n_small.clamp(max=last)), ordered.gather(1, (last - n_large).clamp(min=0))
    half_range = torch.where(n_small + n_large <= last, (high - low) / 2, 0.0)
    rank = torch.arange(last + 1, device=ordered.device)
    left_out = (rank < n_small) | (rank > last - n_large) | (half_range <= 0)
    index = ((ordered - low) * (bins / 2 / half_range)).clamp_(0, bins - 1).masked_fill_(left_out, bins).int().view(-1)
    weights = half_range.double().square().expand_as(ordered).reshape(-1)
    counts = torch.bincount(index, minlength=bins + 1)
    return counts[:bins], torch.bincount(index, weights, minlength=bins + 1)[:bins]
