"""Norms of the channel pairs that RoPE rotates."""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from calib.statistics.loops import add_pairs
from calib.statistics.statistic import Statistic, adopt_device


class PairNorms(Statistic):
    """Largest norm and mean squared norm of each rotary pair: bounds on a key after RoPE, at any position.

    Parameters
    ----------
    pairs : tuple of Tensor
        Channels of the first and of the second member of each pair.
    """

    STATE = ("n_tokens", "largest", "squares")

    def __init__(self, pairs: tuple[Tensor, Tensor]) -> None:
        self.pairs = pairs
        self.n_tokens = torch.zeros((), dtype=torch.int64)
        self.largest = torch.zeros(len(pairs[0]))
        self.squares = torch.zeros(len(pairs[0]), dtype=torch.float64)

    def update(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Accumulates tokens, which must be finite."""
        if x.shape[0] == 0:
            return
        adopt_device(self, x.device)
        largest, sums = (_pairs_by_torch if x.is_cuda else _pairs_compiled)(x.float(), *self.pairs)
        self.n_tokens += x.shape[0]
        self.squares += sums
        self.largest = torch.maximum(self.largest, largest.sqrt())

    def merge(self, other: "PairNorms") -> None:
        """Adds the norms of another statistic."""
        self.n_tokens += other.n_tokens
        self.squares += other.squares
        self.largest = torch.maximum(self.largest, other.largest)

    def bound(self) -> Float32[Tensor, " pairs"]:
        """Largest norm of each pair."""
        # A rotation keeps the norm, so neither channel of the rotated pair can exceed it.
        return self.largest

    def mean_square(self) -> Float64[Tensor, " pairs"]:
        """Mean squared norm of each pair."""
        return self.squares / self.n_tokens.clamp_min(1)


def _pairs_compiled(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Largest squared norm, and sum of the squared norms, of each pair."""
    largest, sums = torch.zeros(len(first)), torch.zeros(len(first), dtype=torch.float64)
    add_pairs(*(tensor.contiguous().numpy() for tensor in (x, first, second, largest, sums)))
    return largest, sums


def _pairs_by_torch(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (x.index_select(1, index.to(x.device)).square() for index in (first, second))
    squares = a + b
    return squares.amax(dim=0), squares.sum(dim=0, dtype=torch.float64)


def rotary_pairs(kv_heads: int, head_dim: int, rotary_dim: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Channel pairs that RoPE rotates, over all heads.

    Parameters
    ----------
    kv_heads, head_dim : int
        Shape of a key.
    rotary_dim : int
        Leading channels of each head that rotate.
    interleaved : bool
        Pairs (0, 1), (2, 3), ... instead of (0, half), (1, half + 1), ...
    """
    # Halves as in Llama's rotate_half, neighbours as in the original RoPE (arXiv 2104.09864) and GPT-J.
    half = rotary_dim // 2
    first = torch.arange(0, rotary_dim, 2) if interleaved else torch.arange(half)
    heads = torch.arange(kv_heads)[:, None] * head_dim
    return (heads + first).reshape(-1), (heads + first + (1 if interleaved else half)).reshape(-1)
