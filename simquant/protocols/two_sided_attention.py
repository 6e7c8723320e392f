"""Two-sided attention: each query reads recent tokens in full precision and older ones decoded."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from simquant.cache.attention.block_attention import Scoring, widened
from simquant.policy.policy import CachePolicy, ResidualWindow
from simquant.protocols.chunking import Chunking


def encoded_tokens(
    window: ResidualWindow, policy: CachePolicy, chunking: Chunking, n_tokens: int
) -> Bool[Tensor, "queries tokens"]:
    """Band mask of the tokens (columns) that a cache has encoded when each query (row) runs.

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
    """End of the encoded range when each query runs; it begins after the sinks.

    Parameters
    ----------
    window, policy : ResidualWindow, CachePolicy
        Residual window of keys or of values, and the policy with its sinks and `exact_prefill`.
    chunking : Chunking
        Steps in which the text is read.
    n_tokens : int
        Length of the text.
    """
    # A step appends its tokens before it attends, so that the encoded range depends on all tokens held in that step.
    # `exact_prefill` attends before anything is encoded: none of the first step's queries reads a code.
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
    """Attention of one sequence in which masks select decoded or full-precision keys and values for each query.

    Parameters
    ----------
    query : Tensor
        Queries of one sequence.
    exact, decoded : tuple of Tensor
        Keys and values in full precision, and after encoding and decoding.
    choice : tuple of Bool[Tensor, "queries tokens"]
        Masks: keys read decoded, values read decoded, and tokens visible to the query.
    scoring : Scoring
        Scale, softcap and sink logits of the layer.
    """
    (key, value), (old_key, old_value) = ([widened(x) for x in pair] for pair in (exact, decoded))
    decoded_key, decoded_value, visible = choice
    kv_heads, n_queries = key.shape[0], query.shape[1]
    # Grouped-query attention: the query heads of a KV head are stacked along the queries, for one product per KV head.
    # [kv_heads, group * queries, head_dim]
    grouped = (widened(query) * scoring.scaling).reshape(kv_heads, -1, query.shape[2])
    # A row of softmax(q K^T) V needs one score and one value per token. Both score matrices are computed, the band mask
    # picks each entry, and the weights split in two by the mask of the values: w V = (w m) V_decoded + (w (1 - m)) V.
    # KIVI computes the same split for one decode step, over its quantized and its full-precision part (2402.02750).
    new, old = (scoring.scores(grouped, k).unflatten(1, (-1, n_queries)) for k in (key, old_key))
    scores = torch.where(decoded_key, old, new).masked_fill(~visible, -torch.inf)  # [kv_heads, group, queries, tokens]
    weights = _softmax(scores, scoring.sink_logits)
    old, new = (weights * decoded_value).flatten(1, 2), (weights * ~decoded_value).flatten(1, 2)
    mixed = (old @ old_value + new @ value).view(query.shape)
    return mixed.transpose(0, 1).to(query.dtype)


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Attention weights; with sink logits they add up to less than one."""
    if sink_logits is None:
        return scores.softmax(dim=-1)
    # gpt-oss: a learned logit per head joins the softmax and has no value, so that its column is dropped afterwards.
    sinks = sink_logits.to(scores.dtype).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
