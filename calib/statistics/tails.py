"""The largest and smallest values of each channel, exactly."""

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from calib.statistics.statistic import Statistic, adopt_device


class Tails(Statistic):
    """The `depth` smallest and largest values of each channel, from which outer percentiles are exact.

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
        """Takes in finite tokens."""
        adopt_device(self, x.device)
        self.n_tokens += x.shape[0]
        self.smallest = _smallest(self.smallest, x.float())
        self.largest = -_smallest(-self.largest, -x.float())

    def merge(self, other: "Tails") -> None:
        """Takes in what another statistic has seen."""
        self.n_tokens += other.n_tokens
        self.smallest = _smallest(self.smallest, other.smallest)
        self.largest = -_smallest(-self.largest, -other.largest)

    @property
    def minimum(self) -> Float32[Tensor, " channels"]:
        """Smallest value of each channel."""
        return self.smallest[0]

    @property
    def maximum(self) -> Float32[Tensor, " channels"]:
        """Largest value of each channel."""
        return self.largest[0]

    def covers(self, tail: float) -> bool:
        """Whether the quantiles `tail` and `1 - tail` can be read off exactly."""
        return self._rank(tail)[0] + 1 < min(self.depth, int(self.n_tokens))

    def quantiles(self, tail: float) -> tuple[Float32[Tensor, " channels"], Float32[Tensor, " channels"]]:
        """Each channel's quantiles `tail` and `1 - tail`, linearly interpolated as numpy does it."""
        rank, part = self._rank(tail)
        follow = min(rank + 1, self.depth - 1) if part else rank
        return (
            torch.lerp(self.smallest[rank], self.smallest[follow], part),
            torch.lerp(self.largest[rank], self.largest[follow], part),
        )

    def _rank(self, tail: float) -> tuple[int, float]:
        position = tail * (int(self.n_tokens) - 1)
        return int(position), position - int(position)


def _smallest(
    kept: Float32[Tensor, "depth channels"], x: Float32[Tensor, "tokens channels"]
) -> Float32[Tensor, "depth channels"]:
    """The smallest values of each channel, ascending. On the CPU by numpy, whose partition is several times faster."""
    depth, rows = len(kept), torch.cat([kept, x.to(kept)]).T.contiguous()
    if rows.is_cuda:
        return rows.topk(depth, largest=False).values.T.contiguous()
    values = np.partition(rows.numpy(), depth - 1, axis=1)[:, :depth]
    values.sort(axis=1)
    return torch.from_numpy(values).T.contiguous()
