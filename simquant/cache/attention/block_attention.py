"""Softmax attention over keys and values that come block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SCORES = 2**22
"""Scores that are held at a time: queries are taken in parts where a block has more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """How an attention layer turns products into weights.

    Parameters
    ----------
    scaling : float
        Factor of the products of queries and keys.
    softcap : float or None
        c in c * tanh(score / c).
    sink_logits : Float[Tensor, "q_heads"] or None
        A score for each head to which no value belongs.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Float[Tensor, " q_heads"] | None = None

    def scores(
        self, query: Float[Tensor, "*any queries head_dim"], key: Float[Tensor, "*any tokens head_dim"]
    ) -> Tensor:
        """Scores before masking; `query` has been scaled."""
        scores = query @ key.transpose(-1, -2)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


class BlockAttention:
    """Attention of some queries of one sequence; heads that share keys are computed together, in float32 or wider.

    Parameters
    ----------
    query : Float[Tensor, "q_heads queries head_dim"]
        As the model hands them over.
    kv_heads : int
        Heads of keys and values; a divisor of the query heads.
    scoring : Scoring
        How scores are made.

    References
    ----------
    arXiv:1805.02867, algorithm 3: the running maximum and sum that make one pass enough.
    """

    def __init__(self, query: Float[Tensor, "q_heads queries head_dim"], kv_heads: int, scoring: Scoring) -> None:
        q_heads, n_queries, head_dim = query.shape
        self._scoring, self._dtype = scoring, query.dtype
        self._query = (widened(query) * scoring.scaling).view(kv_heads, q_heads // kv_heads, n_queries, head_dim)
        state = (kv_heads, q_heads // kv_heads, n_queries)
        logits = scoring.sink_logits
        if logits is None:
            self._largest = self._query.new_full(state, -torch.inf)
            self._total = torch.zeros_like(self._largest)
        else:
            self._largest = logits.to(self._query.dtype).view(*state[:2], 1).repeat(1, 1, n_queries)
            self._total = torch.ones_like(self._largest)
        self._sum: Tensor | None = None

    def add(
        self,
        key: Callable[[], Float[Tensor, "kv_heads tokens head_dim"]],
        value: Callable[[], Float[Tensor, "kv_heads tokens value_dim"]],
        visible: Bool[Tensor, "queries tokens"],
    ) -> None:
        """Takes in some more tokens, whose keys and values are fetched in turn; hidden ones are not looked at."""
        n_queries, heads = self._query.shape[2], self._query.shape[0] * self._query.shape[1]
        step = max(1, _SCORES // max(1, heads * visible.shape[1]))
        parts = [slice(start, start + step) for start in range(0, n_queries, step)]
        if len(parts) > 1:  # fetched once; where there is one part, the keys are let go before the values are fetched
            key, value = cache(key), cache(value)
        for part in parts:
            if visible[part].any():
                self._add(part, key, value, visible[part])

    def result(self) -> Float[Tensor, "queries q_heads value_dim"]:
        """The weighted means of the values; zeros for a query that saw nothing."""
        total = torch.zeros_like(self._query) if self._sum is None else self._sum
        mean = total / self._total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return mean.flatten(0, 1).transpose(0, 1).to(self._dtype)

    def _add(
        self, part: slice, key: Callable[[], Tensor], value: Callable[[], Tensor], visible: Bool[Tensor, "part tokens"]
    ) -> None:
        query = self._query[:, :, part]
        scores = self._scoring.scores(query.flatten(1, 2), widened(key())).unflatten(1, query.shape[1:3])
        scores.masked_fill_(~visible, -torch.inf)
        largest = torch.maximum(self._largest[:, :, part], scores.amax(dim=-1))
        # A query that has seen nothing yet has no largest score: zero in its place keeps exp(-inf) zero, not NaN.
        base = torch.where(largest.isneginf(), 0.0, largest)
        weights = (scores - base.unsqueeze(-1)).exp_()
        fade = (self._largest[:, :, part] - base).exp()
        self._total[:, :, part] = self._total[:, :, part] * fade + weights.sum(dim=-1)
        mixed = (weights.flatten(1, 2) @ widened(value())).unflatten(1, query.shape[1:3])
        if self._sum is None:
            self._sum = mixed.new_zeros(*self._query.shape[:3], mixed.shape[-1])
        self._sum[:, :, part] = self._sum[:, :, part] * fade.unsqueeze(-1) + mixed
        self._largest[:, :, part] = largest


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or wider where it is so already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(
    query: Float[Tensor, "batch q_heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    visible: Bool[Tensor, "#batch queries tokens"],
    scoring: Scoring,
) -> Float[Tensor, "batch queries q_heads value_dim"]:
    """Attention over keys and values that are all at hand."""
    rows = []
    for row in range(len(query)):
        attention = BlockAttention(query[row], key.shape[1], scoring)
        own = visible[min(row, len(visible) - 1)]
        attention.add(partial(key.__getitem__, row), partial(value.__getitem__, row), own)
        rows.append(attention.result())
    return torch.stack(rows)
