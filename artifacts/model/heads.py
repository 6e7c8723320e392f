"""Heads in the output of a projection or norm, and the match between them and cached heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from artifacts.model.hooks import Hook, Layout

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads of one output, in the order of its columns: keys, values, queries, or several of these.

    Parameters
    ----------
    x : Float[Tensor, "1 heads tokens head_dim"]
        Heads, with the channels of each assumed adjacent; a comparison with the cache confirms that.
    layout : {'flat', 'tokens_first', 'heads_first'}
        See `Hook`.
    """

    x: Float[Tensor, "1 heads tokens head_dim"]
    layout: Layout

    @classmethod
    def of(cls, output: Tensor, n_tokens: int, head_dim: int) -> "Self | None":
        """Heads of an output for one sequence, or None if its shape does not consist of whole heads."""
        match tuple(output.shape):
            case (1, n, channels) if n == n_tokens and channels % head_dim == 0:
                return cls(output.unflatten(-1, (-1, head_dim)).transpose(1, 2), "flat")
            case (1, n, _, d) if (n, d) == (n_tokens, head_dim):
                return cls(output.transpose(1, 2), "tokens_first")
            case (1, _, n, d) if (n, d) == (n_tokens, head_dim):
                return cls(output, "heads_first")
        return None

    def __len__(self) -> int:
        return self.x.shape[1]

    def hook(self, module: nn.Module, chosen: Sequence[int]) -> Hook | None:
        """Hook on the chosen heads of a module's output; None for a subset of heads that have an axis of their own."""
        head_dim = self.x.shape[-1]
        if list(chosen) == list(range(len(self))):
            return Hook(module, None, len(chosen), head_dim, self.layout)
        if self.layout != "flat":
            return None
        return Hook(module, _columns(chosen, head_dim), len(chosen), head_dim, "flat")


def nearest(
    cached: Float[Tensor, "1 kv_heads tokens head_dim"], heads: Float[Tensor, "1 heads tokens head_dim"]
) -> list[int]:
    """Index of the most similar head for each cached head, by Euclidean distance."""
    # Heads are independent Gaussian noise of the probe: distances to wrong ones concentrate near sigma sqrt(2 n).
    found: list[int] = torch.cdist(cached[0].flatten(1).double(), heads[0].flatten(1).double()).argmin(dim=1).tolist()
    return found


def _columns(heads: Sequence[int], head_dim: int) -> tuple[slice, ...]:
    """Column slices of the heads, one slice for each run of neighbours."""
    starts = [i for i, head in enumerate(heads) if i == 0 or head != heads[i - 1] + 1]
    stops = [*starts[1:], len(heads)]
    return tuple(slice(heads[i] * head_dim, (heads[j - 1] + 1) * head_dim) for i, j in zip(starts, stops, strict=True))
