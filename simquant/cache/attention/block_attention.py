"""Block attention: softmax attention with a running maximum over keys and values that are decoded block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SCORES = 2**22
"""Attention scores in memory at a time; queries are split where a block has more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """Parameters of an attention layer's scores: scale, softcap and sink logits.

    Parameters
    ----------
    scaling : float
        Factor of the dot products of queries and keys, as a rule 1 / sqrt(head_dim).
    softcap : float or None
        The c of c * tanh(score / c) (Gemma 2).
    sink_logits : Float[Tensor, "q_heads"] or None
        Extra logit of each head in the softmax, without a value (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Float[Tensor, " q_heads"] | None = None

    def scores(
        self, query: Float[Tensor, "*any queries head_dim"], key: Float[Tensor, "*any tokens head_dim"]
    ) -> Tensor:
        """Scores before masking, of queries that are scaled already."""
        scores = query @ key.transpose(-1, -2)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


class BlockAttention:
    """Grouped-query attention of one sequence by online softmax, one block of tokens at a time, in float32 or wider.

    Parameters
    ----------
    query : Float[Tensor, "q_heads queries head_dim"]
        Queries of the model, not yet scaled.
    kv_heads : int
        Heads of keys and values; a divisor of the query heads.
    scoring : Scoring
        Scale, softcap and sink logits.

    References
    ----------
    Online normalizer calculation for softmax, arXiv:1805.02867, algorithm 3; FlashAttention, arXiv:2205.14135.
    """

    def __init__(self, query: Float[Tensor, "q_heads queries head_dim"], kv_heads: int, scoring: Scoring) -> None:
        q_heads, n_queries, head_dim = query.shape
        self._scoring, self._dtype = scoring, query.dtype
        self._query = (widened(query) * scoring.scaling).view(kv_heads, q_heads // kv_heads, n_queries, head_dim)
        # Running state per KV head, query head of its group, and query: maximum m, sum l, and output o (`_sum`).
        state = (kv_heads, q_heads // kv_heads, n_queries)
        logits = scoring.sink_logits
        if logits is None:
            self._largest = self._query.new_full(state, -torch.inf)
            self._total = torch.zeros_like(self._largest)
        else:
            # A sink logit is one more score without a value: the maximum starts there, the sum at exp(0) = 1.
            self._largest = logits.to(self._query.dtype).view(*state[:2], 1).repeat(1, 1, n_queries)
            self._total = torch.ones_like(self._largest)
        self._sum: Tensor | None = None

    def add(
        self,
        key: Callable[[], Float[Tensor, "kv_heads tokens head_dim"]],
        value: Callable[[], Float[Tensor, "kv_heads tokens value_dim"]],
        visible: Bool[Tensor, "queries tokens"],
    ) -> None:
        """Adds a block of tokens, decoding keys, then values; a block that no query sees is not decoded."""
        n_queries, heads = self._query.shape[2], self._query.shape[0] * self._query.shape[1]
        size = max(1, _SCORES // max(1, heads * visible.shape[1]))
        parts = [slice(start, start + size) for start in range(0, n_queries, size)]
        if len(parts) > 1:  # decode once for all parts; a single part frees the keys before it decodes the values
            key, value = cache(key), cache(value)
        for part in parts:
            if visible[part].any():
                self._add(part, key, value, visible[part])

    def add_splits(
        self,
        sums: Float[Tensor, "q_heads splits value_dim"],
        largest: Float[Tensor, "q_heads splits"],
        totals: Float[Tensor, "q_heads splits"],
    ) -> None:
        """Adds tokens of which a kernel has the outputs before division, maxima and sums; for a single query, first."""
        grouped = self._largest.shape[:2]
        sums, largest, totals = (x.unflatten(0, grouped) for x in (sums, largest, totals))
        before, self._largest = self._largest, torch.maximum(self._largest, largest.amax(dim=-1, keepdim=True))
        weights = (largest - self._largest).exp()
        self._total = self._total * (before - self._largest).exp() + (weights * totals).sum(dim=-1, keepdim=True)
        self._sum = (weights.unsqueeze(-2) @ sums).to(self._query.dtype)

    def result(self) -> Float[Tensor, "queries q_heads value_dim"]:
        """Attention output; zeros for a query that saw no token."""
        # o / l; l is at least exp(0) = 1 for a query that saw a token, and 0 otherwise, when o is 0 as well.
        total = torch.zeros_like(self._query) if self._sum is None else self._sum
        mean = total / self._total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return mean.flatten(0, 1).transpose(0, 1).to(self._dtype)

    def _add(
        self, part: slice, key: Callable[[], Tensor], value: Callable[[], Tensor], visible: Bool[Tensor, "part tokens"]
    ) -> None:
        query = self._query[:, :, part]  # [kv_heads, group, queries, head_dim]
        scores = self._scoring.scores(query.flatten(1, 2), widened(key())).unflatten(1, query.shape[1:3])
        scores.masked_fill_(~visible, -torch.inf)  # [kv_heads, group, queries, tokens]
        # Online softmax: m' = max(m, max s), l' = l e^(m - m') + sum e^(s - m'), o' = o e^(m - m') + e^(s - m') V; the
        # output is o / l after the last block. Only one block of scores is in memory (arXiv:1805.02867, algorithm 3).
        largest = torch.maximum(self._largest[:, :, part], scores.amax(dim=-1))
        # A query that has seen no token yet has m' = -inf: zero in its place keeps exp(-inf) zero, not NaN.
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
    """`x` in float32, or unchanged if wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(
    query: Float[Tensor, "batch q_heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    visible: Bool[Tensor, "#batch queries tokens"],
    scoring: Scoring,
) -> Float[Tensor, "batch queries q_heads value_dim"]:
    """Attention of a batch over keys and values in full precision."""
    rows = []
    for row in range(len(query)):
        attention = BlockAttention(query[row], key.shape[1], scoring)
        own = visible[min(row, len(visible) - 1)]
        attention.add(partial(key.__getitem__, row), partial(value.__getitem__, row), own)
        rows.append(attention.result())
    return torch.stack(rows)
