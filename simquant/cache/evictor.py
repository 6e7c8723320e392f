"""Eviction of tokens from a layer after each step: attention scores, pooling, and the choice of whole groups."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.errors import MismatchError
from artifacts.model.attention import AttentionLayer
from simquant.cache.attention.block_attention import Scoring, widened
from simquant.cache.store.cached_sequence import CachedSequence
from simquant.cache.store.layer_store import LayerStore
from simquant.cache.store.rotary_tables import RotaryTables
from simquant.policy.eviction import Choice, Eviction
from simquant.policy.policy import CachePolicy

_SCORES = 2**22
"""Attention scores in memory at a time; queries are split so that there are no more."""

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Iterates over the blocks of a sequence from the start: keys "kv_heads tokens head_dim", mask "queries tokens"."""


def attention_received(
    query: Float[Tensor, "q_heads queries head_dim"], kv_heads: int, blocks: Blocks, scoring: Scoring
) -> Float[Tensor, "kv_heads tokens"]:
    """Attention weights that each token receives, summed over queries and averaged over the heads of a KV head."""
    # H2O's accumulated attention, and SnapKV's over its observation window: s_j = sum_i exp(q_i k_j - L_i), with L_i
    # the log-sum-exp of row i. L_i needs all keys, so that blocks are decoded twice (first L, then the weights) and
    # the matrix of queries x tokens is never in memory.
    grouped = (widened(query) * scoring.scaling).unflatten(0, (kv_heads, -1))  # [kv_heads, group, queries, head_dim]
    total = _log_total(grouped, blocks, scoring)  # [kv_heads, group, queries, 1]
    received = []
    for key, visible in blocks():
        parts = zip(*(x.split(_part(grouped, key), dim=2) for x in (grouped, total)), strict=True)
        seen = visible.split(_part(grouped, key))
        weights = [
            (_logits(part, key, own, scoring) - sums).exp_().sum(dim=2)
            for (part, sums), own in zip(parts, seen, strict=True)
        ]
        # Sum over queries, mean over the group of query heads that read the same KV head.
        received.append(torch.stack(weights).sum(dim=0).mean(dim=1))
    return torch.cat(received, dim=1)


def pooled(
    scores: Float[Tensor, "kv_heads tokens"], pooling: str, kernel_tokens: int
) -> Float[Tensor, "kv_heads tokens"]:
    """Scores smoothed over neighbouring tokens, by 'avg' or 'max'; the mean counts zeros beyond the ends."""
    # SnapKV (2404.14469) pools scores along the tokens so that a heavy token is kept together with its context. Stride
    # 1 and padding k // 2, k odd, leave one score per token; avg_pool1d divides by k at the ends, as its code does.
    pool = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
    shared: Tensor = pool(scores, kernel_tokens, stride=1, padding=kernel_tokens // 2)
    return shared


def _log_total(grouped: Tensor, blocks: Blocks, scoring: Scoring) -> Float[Tensor, "kv_heads group queries 1"]:
    """Log-sum-exp of each query's scores, the denominator of its softmax; zero for a query that sees no token."""
    total = grouped.new_full((*grouped.shape[:3], 1), -torch.inf)
    if scoring.sink_logits is not None:
        total[:] = scoring.sink_logits.to(total.dtype).view(*grouped.shape[:2], 1, 1)
    for key, visible in blocks():
        size = _part(grouped, key)
        logits = (
            _logits(part, key, own, scoring)
            for part, own in zip(grouped.split(size, dim=2), visible.split(size), strict=True)
        )
        # log(e^a + e^b) block by block: the denominator of an online softmax, in the logarithm (arXiv:1805.02867).
        total = torch.logaddexp(total, torch.cat([part.logsumexp(dim=-1, keepdim=True) for part in logits], dim=2))
    seen: Tensor = total.masked_fill(total.isneginf(), 0.0)
    return seen


def _part(grouped: Tensor, key: Tensor) -> int:
    """Number of queries per part."""
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


@dataclass(frozen=True, eq=False)
class Reading:
    """Queries, mask, scoring and rotary tables of one layer in one step; see `LayerStore.attend`."""

    query: Float[Tensor, "batch q_heads queries head_dim"]
    visible: Bool[Tensor, "#batch queries columns"]
    scoring: Scoring
    tables: RotaryTables

    def received(self, store: LayerStore, row: int, n_queries: int) -> Float[Tensor, "kv_heads held"]:
        """Attention that the last queries of one sequence give each token in the cache."""
        visible = self.visible[min(row, len(self.visible) - 1), -n_queries:]
        query = self.query[row, :, -n_queries:]
        blocks = partial(store.key_blocks, row, visible, self.tables)
        return attention_received(query, store.layer.kv_heads, blocks, self.scoring)


@final
@dataclass(frozen=True)
class Evictor:
    """Evicts tokens from the layers of a model; all state is in the caches themselves.

    Parameters
    ----------
    eviction : Eviction
        Budgets and rules.
    n_layers : int
        Layers of the model, over which PyramidKV spreads its budget.
    """

    eviction: Eviction
    n_layers: int

    def after_step(self, store: LayerStore, reading: Reading) -> None:
        """Evicts the tokens that exceed the budget of each sequence."""
        for row, sequence in enumerate(store.sequences):
            if sequence.survivors is None or not sequence.survivors.n_seen:  # nothing but padding so far
                continue
            choice = self._choice(store.layer.layer, sequence, reading.query.shape[2])
            groups = None if choice is None else _groups(sequence, choice)
            if choice is not None and groups is not None:
                scores = _never_dropped(sequence, self._scores(choice, store, row, reading))
                sequence = sequence.keep(_kept(sequence, groups, scores))
            store.sequences[row] = sequence.after_prompt()

    def _choice(self, layer: int, sequence: CachedSequence, n_new: int) -> Choice | None:
        survivors = sequence.survivors
        assert survivors is not None
        if not survivors.n_prompt:
            return self.eviction.of_prompt(survivors.n_seen, layer, self.n_layers)
        n_decoded = survivors.n_seen - survivors.n_prompt
        return self.eviction.of_decoded(len(survivors.numbers), survivors.n_prompt_kept, n_decoded, n_new)

    def _scores(self, choice: Choice, store: LayerStore, row: int, reading: Reading) -> Float[Tensor, " tokens"]:
        """Score of each token in the cache, up to the last candidate."""
        if choice.n_queries == 0:  # StreamingLLM: earlier tokens score higher, so that the first are kept
            return -torch.arange(choice.end, device=reading.query.device).float()
        survivors = store.sequences[row].survivors
        assert survivors is not None
        n_queries = min(choice.n_queries or survivors.n_seen, survivors.n_seen, reading.query.shape[2])
        received = reading.received(store, row, n_queries)[:, : choice.end]
        if choice.pooled:
            received = pooled(received, self.eviction.pooling, self.eviction.kernel_tokens)
        return received.mean(dim=0)


def check_evictable(policy: CachePolicy, layers: Sequence[AttentionLayer]) -> None:
    """Check that a policy with eviction has a layer to evict from.

    Raises
    ------
    MismatchError
        If every layer has sliding-window attention.
    """
    if policy.eviction is not None and all(layer.sliding_window is not None for layer in layers):
        raise MismatchError(
            f"eviction: expected a layer with full attention; got {len(layers)} layers of sliding-window attention, "
            "which drop old tokens anyway. Use a policy without eviction."
        )


@dataclass(frozen=True)
class _Groups:
    """Candidates for eviction: encoded tokens, in whole groups that share scales.

    Parameters
    ----------
    first, n_groups, size : int
        First token of the first group, number of groups, tokens per group.
    n_kept : int
        Groups to keep.
    """

    first: int
    n_groups: int
    size: int
    n_kept: int


def _groups(sequence: CachedSequence, choice: Choice) -> _Groups | None:
    """Whole groups among the candidates; None if all are kept. Candidates outside of them are kept, and counted."""
    stores = sequence.stores()
    sinks, size = sequence.key.sink_tokens, math.lcm(*(store.quantizer.tokens_per_scale or 1 for store in stores))
    # Groups are counted from the first token after the sinks: round the start up to a group, and the end (candidates
    # that both keys and values have encoded) down. The budget left after the tokens outside is rounded up to groups.
    first = sinks + -(-max(0, choice.start - sinks) // size) * size
    n_groups = max(0, min(choice.end, *(store.encoded_end for store in stores)) - first) // size
    n_outside = choice.end - choice.start - n_groups * size
    n_kept = -(-max(0, choice.n_kept - n_outside) // size)
    return _Groups(first, n_groups, size, n_kept) if n_kept < n_groups else None


def _never_dropped(sequence: CachedSequence, scores: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Scores with infinity at the tokens kept in full precision for their small key norms."""
    if sequence.small is None:
        return scores
    assert sequence.survivors is not None
    return scores.masked_fill(torch.isin(sequence.survivors.numbers[: len(scores)], sequence.small.numbers), torch.inf)


def _kept(sequence: CachedSequence, groups: _Groups, scores: Float[Tensor, " tokens"]) -> Bool[Tensor, " held"]:
    """Mask of the kept tokens: all but the groups of lowest mean score; ties keep the first, infinite scores all."""
    kept = torch.ones(sequence.key.n_tokens, dtype=torch.bool, device=scores.device)
    candidates = slice(groups.first, groups.first + groups.n_groups * groups.size)
    # A group is kept or evicted as a whole by its mean score. Groups with infinite scores (small key norms) may exceed
    # the budget: all of them are kept. The stable sort makes ties independent of the device.
    by_group = scores[candidates].view(groups.n_groups, groups.size).mean(dim=1)
    order = by_group.sort(descending=True, stable=True).indices
    n_kept = max(groups.n_kept, int(by_group.isinf().sum()))
    kept[candidates].view(groups.n_groups, groups.size)[order[n_kept:]] = False
    return kept
