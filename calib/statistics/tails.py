"""Exact tails: the largest and smallest values of each channel."""

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from calib.statistics.loops import keep_extremes
from calib.statistics.statistic import Statistic, adopt_device


class Tails(Statistic):
    """The `depth` smallest and largest values of each channel, for exact outer percentiles.

    Parameters
    ----------
    channels : int
        Channels of a token.
    depth : int
        Values kept at each end of each channel.
    """

    STATE = ("n_tokens", "smallest", "largest")

    def __init__(self, channels: int, depth: int = 512) -> None:
        self.depth = depth
        self.n_tokens = torch.zeros((), dtype=torch.int64)
        self.smallest = torch.full((depth, channels), torch.inf)
        self.largest = torch.full((depth, channels), -torch.inf)

    def update(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Accumulates tokens, which must be finite."""
        adopt_device(self, x.device)
        self.n_tokens += x.shape[0]
        # Sorting a chunk once serves both ends; merging with sorted extremes is then linear in the depth.
        ordered = _ascending(x.float())
        self._keep(ordered, ordered)

    def merge(self, other: "Tails") -> None:
        """Adds the tails of another statistic."""
        self.n_tokens += other.n_tokens
        self._keep(other.smallest, other.largest.flip(0))

    def _keep(self, smallest: Float32[Tensor, "values channels"], largest: Float32[Tensor, "values channels"]) -> None:
        """Merges candidates for both ends, each ascending."""
        keep = _keep_by_torch if self.smallest.is_cuda else _keep_compiled
        self.smallest = keep(self.smallest, smallest, 1)
        self.largest = keep(self.largest, largest, -1)

    @property
    def minimum(self) -> Float32[Tensor, " channels"]:
        """Smallest value of each channel."""
        return self.smallest[0]

    @property
    def maximum(self) -> Float32[Tensor, " channels"]:
        """Largest value of each channel."""
        return self.largest[0]

    def covers(self, tail: float) -> bool:
        """True if the quantiles `tail` and `1 - tail` are exact."""
        # The quantile t of n values lies between the order statistics floor(p) and floor(p) + 1, p = t (n - 1), as in
        # `numpy.quantile` (Hyndman and Fan 1996, type 7): both must be among those that are kept.
        return self._rank(tail)[0] + 1 < min(self.depth, int(self.n_tokens))

    def quantiles(self, tail: float) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
        """Quantiles `tail` and `1 - tail` of each channel, linearly interpolated as by `numpy.quantile`."""
        rank, part = self._rank(tail)
        follow = min(rank + 1, self.depth - 1) if part else rank
        return (
            torch.lerp(self.smallest[rank], self.smallest[follow], part),
            torch.lerp(self.largest[rank], self.largest[follow], part),
        )

    def _rank(self, tail: float) -> tuple[int, float]:
        position = tail * (int(self.n_tokens) - 1)
        return int(position), position - int(position)


def _ascending(x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
    """Sorted values of each channel; on the CPU by numpy, whose sort is many times faster."""
    if x.is_cuda:
        return x.sort(dim=0).values
    return torch.from_numpy(np.sort(x.T.contiguous().numpy(), axis=1)).T


def _keep_compiled(kept: Tensor, arriving: Tensor, sign: int) -> Float32[Tensor, "depth channels"]:
    found = kept.T.contiguous()
    keep_extremes(found.numpy(), arriving.T.contiguous().numpy(), sign)
    return found.T


def _keep_by_torch(kept: Tensor, arriving: Tensor, sign: int) -> Float32[Tensor, "depth channels"]:
    both = torch.cat([kept, arriving.to(kept)])
    return both.sort(dim=0, descending=sign < 0).values[: len(kept)].clone()
