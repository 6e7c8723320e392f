"""Second moments of channels, in float64."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from calib.statistics.statistic import Statistic, adopt_device

_BLOCK_TOKENS = 256
"""Tokens converted to float64 at a time, few enough to stay in the cache of a core."""


class Moments(Statistic):
    """Token count, channel sums, and sums of products of channels within each of `groups` equal groups.

    Groups are heads for per-head moments; a single group gives the moments of the whole layer.

    Parameters
    ----------
    channels : int
        Channels of a token.
    groups : int
        Number of groups, a divisor of the channels.
    """

    STATE = ("n_tokens", "sums", "products")

    def __init__(self, channels: int, groups: int) -> None:
        width = channels // groups
        self.groups = groups
        self.n_tokens = torch.zeros((), dtype=torch.int64)
        self.sums = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(groups, width, width, dtype=torch.float64)

    def update(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Accumulates tokens, which must be finite."""
        adopt_device(self, x.device)
        self.n_tokens += x.shape[0]
        # float64: covariances E[x y] - E[x] E[y] cancel where the means of channels are large. Products
        # of two float32 numbers are exact in it, so that only sums are rounded.
        for part in x.split(_BLOCK_TOKENS):
            wide = part.double()
            grouped = wide.unflatten(1, (self.groups, self.products.shape[1])).transpose(0, 1)
            self.sums += wide.sum(dim=0)
            self.products.baddbmm_(grouped.mT, grouped)

    def merge(self, other: "Moments") -> None:
        """Adds the moments of another statistic."""
        self.n_tokens += other.n_tokens
        self.sums += other.sums
        self.products += other.products

    def mean(self) -> Float64[Tensor, " channels"]:
        """Mean of each channel."""
        return self.sums / self.n_tokens.clamp_min(1)

    def second(self) -> Float64[Tensor, "groups width width"]:
        """Second moments E[x_i x_j] within each group."""
        return self.products / self.n_tokens.clamp_min(1)


class CrossMoments:
    """Sums of products between the channels of two sites, over the same tokens.

    Parameters
    ----------
    left, right : int
        Channels of the two sites.
    """

    def __init__(self, left: int, right: int) -> None:
        self.products = torch.zeros(left, right, dtype=torch.float64)

    def update(self, x: Float[Tensor, "tokens left"], y: Float[Tensor, "tokens right"]) -> None:
        """Accumulates the vectors of the same tokens at both sites."""
        self.products = self.products.to(x.device)
        self.products += x.double().T @ y.double()

    def merge(self, other: "CrossMoments") -> None:
        """Adds the moments of another statistic."""
        self.products += other.products
