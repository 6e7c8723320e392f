"""Attention in which each query reads some tokens exact and the others as a cache has encoded them."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from simquant.cache.attention.block_attention import Scoring, widened
from simquant.policy.policy import CachePolicy, ResidualWindow
from simquant.protocols.chunking import Chunking


def encoded_tokens(
    window: ResidualWindow, policy: CachePolicy, chunking: Chunking, n_tokens: int
) -> Bool[Tensor, "queries tokens"]:
    """Which tokens (columns) a cache has encoded when each token (row) is read: a band below the diagonal.

    Parameters
    ----------
    window, policy, chunking, n_tokens
        See `encoded_ends`.
    """
    tokens = torch.arange(n_tokens)
    return (tokens >= policy.sink_tokens) & (tokens < encoded_ends(window, policy, chunking, n_tokens)[:, None])


def encoded_ends(
    window: ResidualWindow, policy: CachePolicy, chunking: Chunking, n_tokens: int
) -> Int64[Tensor, " tokens"]:
    """Where the tokens end that a cache has encoded when each token is read; they begin after the sinks.

    Parameters
    ----------
    window, policy : ResidualWindow, CachePolicy
        The window of keys or of values; sinks, and whether the first step reads exact tokens, are the policy's.
    chunking : Chunking
        How the text enters the cache.
    n_tokens : int
        Length of the text.
    """
    held = chunking.held(n_tokens)
    ends = torch.tensor([window.encoded_end(n, policy.sink_tokens) for n in held.tolist()])
    if policy.exact_prefill:
        ends[: chunking.prefill_tokens] = 0
    return ends


def two_sided_attention(
    query: Float[Tensor, "q_heads queries head_dim"],
    exact: tuple[Float[Tensor, "kv_heads tokens head_dim"], Float[Tensor, "kv_heads tokens head_dim"]],
    decoded: tuple[Float[Tensor, "kv_heads tokens head_dim"], Float[Tensor, "kv_heads tokens head_dim"]],
    choice: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
) -> Float[Tensor, "queries q_heads head_dim"]:
    """Attention in which each query reads some keys and values exact and the others decoded.

    Parameters
    ----------
    query : Tensor
        Queries of one sequence.
    exact, decoded : tuple of Tensor
        Keys and values, both ways.
    choice : tuple of Bool[Tensor, "queries tokens"]
        Which keys are read decoded, which values, and which tokens are visible.
    scoring : Scoring
        How scores are made.
    """
    (key, value), (old_key, old_value) = ([widened(x) for x in pair] for pair in (exact, decoded))
    decoded_key, decoded_value, visible = choice
    kv_heads, n_queries = key.shape[0], query.shape[1]
    grouped = (widened(query) * scoring.scaling).reshape(kv_heads, -1, query.shape[2])
    new, old = (scoring.scores(grouped, k).unflatten(1, (-1, n_queries)) for k in (key, old_key))
    scores = torch.where(decoded_key, old, new).masked_fill(~visible, -torch.inf)
    weights = _softmax(scores, scoring.sink_logits)
    old, new = (weights * decoded_value).flatten(1, 2), (weights * ~decoded_value).flatten(1, 2)
    mixed = (old @ old_value + new @ value).view(query.shape)
    return mixed.transpose(0, 1).to(query.dtype)


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Weights of the tokens; with sink logits they add up to less than one."""
    if sink_logits is None:
        return scores.softmax(dim=-1)
    sinks = sink_logits.to(scores.dtype).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
