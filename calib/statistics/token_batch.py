"""Tokens of a forward pass: their positions and windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from calib.statistics.row_sample import priorities


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of one forward pass, without padding.

    Parameters
    ----------
    positions : Int64[Tensor, "tokens"]
        Position of each token within its window, from 0.
    windows : Int64[Tensor, "tokens"]
        Number of each token's window in the run.
    digests : Sequence[str]
        Content digest of each window of the batch, in order.
    """

    positions: Int64[Tensor, " tokens"]
    windows: Int64[Tensor, " tokens"]
    digests: Sequence[str]

    def token_priorities(self) -> Int64[Tensor, " tokens"]:
        """Pseudo-random priority of each token, from its window and position."""
        return self._priorities(self.positions)

    def window_priorities(self) -> Int64[Tensor, " tokens"]:
        """Pseudo-random priority of each window, equal for all its tokens, so that windows are sampled as a whole."""
        return self._priorities(torch.zeros_like(self.positions))

    def _priorities(self, positions: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
        # From content and position, not from a counter: the same tokens get the same priorities in any order of windows
        # and in any shard, so that merged reservoirs equal the reservoir of one run.
        found = torch.empty_like(positions)
        for number, digest in zip(self.windows.unique(), self.digests, strict=True):
            here = self.windows == number
            found[here] = priorities(int(digest, 16), positions[here])
        return found
