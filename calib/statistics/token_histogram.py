"""How values lie within their own token's range, which is what a per-token codebook is fitted to."""

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from artifacts.identity import Identity
from artifacts.sparse import PercentileSparse
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
        for row, fraction in enumerate(OUTLIER_FRACTIONS):
            counts, weights = token_histogram(x.float(), outliers(x.float(), fraction), self.bins)
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


def outliers(x: Float32[Tensor, "tokens channels"], fraction: float) -> Bool[Tensor, "tokens channels"]:
    """Values that the percentile rule would keep apart."""
    if fraction == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    rule = PercentileSparse(channels=x.shape[1], inner=Identity(channels=x.shape[1]), outlier_fraction=fraction)
    return rule.mask(x)


def token_histogram(
    x: Float32[Tensor, "tokens channels"], apart: Bool[Tensor, "tokens channels"], bins: int
) -> tuple[Int64[Tensor, " bins"], Float64[Tensor, " bins"]]:
    """Counts, and counts weighted by the square of the token's half-range, of the values that are not kept apart."""
    low = x.masked_fill(apart, torch.inf).amin(dim=1, keepdim=True)
    high = x.masked_fill(apart, -torch.inf).amax(dim=1, keepdim=True)
    half_range = (high - low) / 2
    left_out = apart | (half_range <= 0)
    index = ((x - low) * (bins / 2 / half_range)).clamp_(0, bins - 1).masked_fill_(left_out, bins).long().view(-1)
    weights = half_range.clamp_min(0).double().square().expand_as(x).reshape(-1)
    counts = torch.bincount(index, minlength=bins + 1)
    return counts[:bins], torch.bincount(index, weights, minlength=bins + 1)[:bins]
