"""Sums of products of channels, in float64."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from calib.statistics.statistic import Statistic, adopt_device

_BLOCK_TOKENS = 256
"""Tokens that are widened at a time: few enough to stay in the cache of a core."""


class Moments(Statistic):
    """Token count, channel sums, and products of the channels within each of `groups` equal groups.

    Groups are heads for per-head moments; one group gives those of the whole layer.

    Parameters
    ----------
    channels : int
        Channels of a token.
    groups : int
        Divides the channels.
    """

    STATE = ("n_tokens", "sums", "products")

    def __init__(self, channels: int, groups: int) -> None:
        width = channels // groups
        self.groups = groups
        self.n_tokens = torch.zeros((), dtype=torch.int64)
        self.sums = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(groups, width, width, dtype=torch.float64)

    def update(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Takes in finite tokens."""
        adopt_device(self, x.device)
        self.n_tokens += x.shape[0]
        for part in x.split(_BLOCK_TOKENS):
            wide = part.double()
            grouped = wide.unflatten(1, (self.groups, self.products.shape[1])).transpose(0, 1)
            self.sums += wide.sum(dim=0)
            self.products.baddbmm_(grouped.mT, grouped)

    def merge(self, other: "Moments") -> None:
        """Takes in what another statistic has seen."""
        self.n_tokens += other.n_tokens
        self.sums += other.sums
        self.products += other.products

    def mean(self) -> Float64[Tensor, " channels"]:
        """Mean of each channel."""
        return self.sums / self.n_tokens.clamp_min(1)

    def second(self) -> Float64[Tensor, "groups width width"]:
        """Mean products E[x_i x_j] within each group."""
        return self.products / self.n_tokens.clamp_min(1)


class CrossMoments:
    """Sums of products between the channels of two sites, for the same tokens.

    Parameters
    ----------
    left, right : int
        Channels of the two sites.
    """

    def __init__(self, left: int, right: int) -> None:
        self.products = torch.zeros(left, right, dtype=torch.float64)

    def update(self, x: Float[Tensor, "tokens left"], y: Float[Tensor, "tokens right"]) -> None:
        """Takes in the vectors of the same tokens."""
        self.products = self.products.to(x.device)
        self.products += x.double().T @ y.double()

    def merge(self, other: "CrossMoments") -> None:
        """Takes in what another statistic has seen."""
        self.products += other.products
