"""The part of a decode step that Triton kernels compute from codes as they are stored.

Kernels take the tokens whose keys and values are both quantized; sinks and the recent window are left to torch. Codes
are not copied: a block of the cache is one call.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.model.attention import AttentionLayer
from artifacts.quantizer import Quantizer
from simquant.cache.attention.block_attention import BlockAttention, Scoring
from simquant.cache.store.cached_sequence import CachedSequence
from simquant.kernels.support import DTYPES, HEAD_DIMS, reads, runs_on


def can_read(
    layer: AttentionLayer, sequence: CachedSequence, query: Tensor, scoring: Scoring, *, rotates: bool
) -> bool:
    """True if kernels compute the attention of a step over the quantized tokens of a sequence.

    The step has a single query and a device with Triton; the layer full attention without softcap, and whole heads that
    rotate by halves if `rotates` (keys are stored before RoPE); the cache no eviction, and quantizers that the kernels
    know.
    """
    return (
        query.shape[2] == 1
        and runs_on(query.device)
        and query.dtype in DTYPES
        and layer.head_dim in HEAD_DIMS
        and layer.sliding_window is None
        and not (torch.is_grad_enabled() and query.requires_grad)
        and (not rotates or _rotates_whole_words(layer, sequence.key.quantizer))
        and scoring.softcap is None
        and sequence.survivors is None
        and all(reads(store.quantizer) for store in sequence.stores())
    )


def _rotates_whole_words(layer: AttentionLayer, keys: Quantizer) -> bool:
    # Kernels read the two halves of a head apart: each has to be whole words of 32 bits (three bits: of 24 bits).
    word_bits = 24 if keys.spec.bits == 3 else 32
    whole = layer.head_dim // 2 * keys.spec.bits % word_bits == 0
    return layer.rotation == "half" and layer.rotary_dim == layer.head_dim and whole


def all_seen(sequence: CachedSequence, visible: Bool[Tensor, "1 columns"]) -> bool:
    """True if there are quantized tokens and the query sees all of them."""
    end = min(store.encoded_end for store in sequence.stores())
    start = sequence.key.sink_tokens
    return end > start and bool(visible[0, sequence.columns(slice(start, end))].all())


def add_packed(
    attention: BlockAttention,
    query: Float[Tensor, "q_heads head_dim"],
    sequence: CachedSequence,
    scaling: float,
    tables: Float[Tensor, "2 columns head_dim"] | None,
) -> Iterator[tuple[int, int]]:
    """Adds the quantized tokens of a sequence to its attention; returns the ranges of tokens that are left.

    `tables` are the cosines and sines of all columns; None where keys are stored as they are read.
    """
    from simquant.kernels.attention import Block, attend_packed  # imports Triton

    blocks, end = [], 0
    for tokens, keys, values in sequence.encoded_blocks():
        own = None if tables is None else tables[:, sequence.columns(tokens)]
        blocks.append(Block(keys, values, tokens.stop - tokens.start, own))
        end = tokens.stop
    quantizers = sequence.key.quantizer, sequence.value.quantizer
    attention.add_splits(*attend_packed(query, quantizers, blocks, scaling))
    left = [(0, sequence.key.sink_tokens), (end, sequence.key.n_tokens)]
    return ((start, stop) for start, stop in left if start < stop)
