"""How much attention tokens get: what eviction chooses by."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from simquant.cache.attention.block_attention import Scoring, widened

_SCORES = 2**22
"""Scores that are held at a time: queries are taken in parts."""

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts over with the blocks of a sequence: keys "kv_heads tokens head_dim", and where "queries tokens" is visible."""


def attention_received(
    query: Float[Tensor, "q_heads queries head_dim"], kv_heads: int, blocks: Blocks, scoring: Scoring
) -> Float[Tensor, "kv_heads tokens"]:
    """The attention weights of each token, summed over the queries that see it, of the mean head that reads the key.

    Keys come twice, block by block: once for the totals of the softmax, once for the weights.
    """
    grouped = (widened(query) * scoring.scaling).unflatten(0, (kv_heads, -1))
    total = _log_total(grouped, blocks, scoring)
    received = []
    for key, visible in blocks():
        parts = zip(*(x.split(_part(grouped, key), dim=2) for x in (grouped, total)), strict=True)
        seen = visible.split(_part(grouped, key))
        weights = [
            (_logits(part, key, own, scoring) - sums).exp_().sum(dim=2)
            for (part, sums), own in zip(parts, seen, strict=True)
        ]
        received.append(torch.stack(weights).sum(dim=0).mean(dim=1))
    return torch.cat(received, dim=1)


def pooled(
    scores: Float[Tensor, "kv_heads tokens"], pooling: str, kernel_tokens: int
) -> Float[Tensor, "kv_heads tokens"]:
    """Each token's score shared with its neighbours, by 'avg' or 'max'; beyond the ends the mean finds zeros."""
    pool = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
    shared: Tensor = pool(scores, kernel_tokens, stride=1, padding=kernel_tokens // 2)
    return shared


def _log_total(grouped: Tensor, blocks: Blocks, scoring: Scoring) -> Float[Tensor, "kv_heads group queries 1"]:
    """The logarithm of the sum that each query's softmax divides by; zero for a query that sees nothing."""
    total = grouped.new_full((*grouped.shape[:3], 1), -torch.inf)
    if scoring.sink_logits is not None:
        total[:] = scoring.sink_logits.to(total.dtype).view(*grouped.shape[:2], 1, 1)
    for key, visible in blocks():
        size = _part(grouped, key)
        logits = (
            _logits(part, key, own, scoring)
            for part, own in zip(grouped.split(size, dim=2), visible.split(size), strict=True)
        )
        total = torch.logaddexp(total, torch.cat([part.logsumexp(dim=-1, keepdim=True) for part in logits], dim=2))
    seen: Tensor = total.masked_fill(total.isneginf(), 0.0)
    return seen


def _part(grouped: Tensor, key: Tensor) -> int:
    """How many queries are taken at a time."""
    return max(1, _SCORES // (grouped.shape[0] * grouped.shape[1] * key.shape[1]))


def _logits(
    query: Float[Tensor, "kv_heads group queries head_dim"],
    key: Float[Tensor, "kv_heads tokens head_dim"],
    visible: Bool[Tensor, "queries tokens"],
    scoring: Scoring,
) -> Float[Tensor, "kv_heads group queries tokens"]:
    logits = scoring.scores(query.flatten(1, 2), widened(key)).unflatten(1, query.shape[1:3])
    hidden: Tensor = logits.masked_fill(~visible, -torch.inf)
    return hidden
