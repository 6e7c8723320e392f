"""Attention of one query token per sequence over packed keys and values, split over the sequence."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from simquant.kernels.attention_programs import merge, packed_split, plain_split
from simquant.kernels.geometry import BLOCK, PLAIN_BLOCK, Geometry, check, group_tile, options, power_of_two
from simquant.kernels.language import constexpr, product_type
from simquant.kernels.sharing import side
from simquant.kernels.tokens import PackedTokens, PlainTokens, window

_WAVES = 4
"""Programs per multiprocessor: more hide the latency of memory, fewer leave less to merge."""

_MOST_SPLITS = 64
"""One program merges all splits of a head, held at once."""

_MERGED_CHANNELS = 32
"""Channels that one program merges."""


class Partial(NamedTuple):
    """Unnormalized sums of every split, their largest scores and their weights."""

    acc: Any
    peak: Any
    total: Any
    n_splits: int


class Cut(NamedTuple):
    """One source's share of the splits: how many, after how many others, of how many tokens."""

    n_splits: int
    before: int
    split_tokens: int


def decode_attention(
    q: Float[Tensor, "batch q_heads head_dim"],
    packed: PackedTokens | None = None,
    exact: PlainTokens | None = None,
    *,
    scale: float | None = None,
    splits: int | None = None,
) -> Float[Tensor, "batch q_heads head_dim"]:
    """softmax(q K^T scale) V for one query token per sequence, over packed and exact tokens together.

    Packed tokens are never dequantized in memory. Scales that all tokens of a block share are multiplied into the
    query, those of a token's head into its score or weight; a narrower group scales each value. What is multiplied is
    float16 (of the dtype of `q` where values are scaled one by one, float32 where `q` is), what is summed float32.

    Parameters
    ----------
    q : Float[Tensor, "batch q_heads head_dim"]
        Queries after the rotary embedding; q_heads a multiple of kv_heads, head_dim a power of two from 32 to 256.
    packed, exact : PackedTokens or None, PlainTokens or None
        Tokens to attend to; either may be missing. Without `packed` this is the split kernel on plain tensors.
    scale : float or None
        Of the scores; None for 1 / sqrt(head_dim).
    splits : int or None
        Parts of a source that are worked on at once, 1 to 64; None for what fills the device.

    Returns
    -------
    Float[Tensor, "batch q_heads head_dim"]
        In the dtype of `q`; zero for a sequence without a live token.

    Raises
    ------
    ImportError
        If Triton is not installed.
    NotImplementedError
        If there is no kernel for a quantizer.
    MismatchError, ValueError
        If shapes do not fit together.

    References
    ----------
    Splits and their merge: arXiv:2311.01282, section 3.
    """
    kv_heads = check(q, packed, exact)
    if splits is not None and not 1 <= splits <= _MOST_SPLITS:
        raise ValueError(f"decode_attention: splits must be from 1 to {_MOST_SPLITS}; got {splits}")
    n_sequences, q = len(q) * kv_heads, q.contiguous()
    sources = [tokens for tokens in (packed, exact) if tokens is not None]
    cuts: list[Cut] = []
    for tokens in sources:
        n_splits, split_tokens = _cut(tokens.n_tokens, splits or _splits(n_sequences, q.device))
        cuts.append(Cut(n_splits, sum(cut.n_splits for cut in cuts), split_tokens))
    partial = _partial(q, sum(cut.n_splits for cut in cuts))
    factor = (scale if scale is not None else 1 / math.sqrt(q.shape[2])) * math.log2(math.e)
    for tokens, cut in zip(sources, cuts, strict=True):
        if isinstance(tokens, PackedTokens):
            _attend_packed(q, tokens, partial, cut, factor)
        else:
            _attend_plain(q, tokens, partial, cut, factor)
    return _merged(q, partial)


def _splits(n_sequences: int, device: torch.device) -> int:
    """As many as give every multiprocessor its programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(_MOST_SPLITS, max(1, _WAVES * processors // n_sequences))


def _cut(n_tokens: int, splits: int) -> tuple[int, int]:
    """Number of splits and their tokens, whole blocks each."""
    split_tokens = max(1, -(-n_tokens // (splits * BLOCK))) * BLOCK
    return -(-n_tokens // split_tokens), split_tokens


def _partial(q: Tensor, n_splits: int) -> Partial:
    batch, q_heads, head_dim = q.shape
    shape = (batch, q_heads, n_splits)
    peak, total = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    return Partial(torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device), peak, total, n_splits)


def _attend_packed(q: Tensor, tokens: PackedTokens, partial: Partial, cut: Cut, factor: float) -> None:
    if cut.n_splits == 0:
        return
    geometry = Geometry.of(tokens, q)
    cosine, sine = (None, None) if tokens.tables is None else (table.contiguous() for table in tokens.tables)
    packed_split[cut.n_splits, len(q) * tokens.keys.shape[1] // q.shape[2]](
        q,
        side(tokens.key_quantizer, tokens.keys, constexpr),
        side(tokens.value_quantizer, tokens.values, constexpr),
        cosine,
        sine,
        0 if cosine is None or len(cosine) == 1 else tokens.n_tokens,
        window(tokens, len(q), q.device),
        partial,
        factor,
        tokens.n_tokens,
        cut.split_tokens,
        geometry,
        **options(tokens, q),
    )


def _attend_plain(q: Tensor, tokens: PlainTokens, partial: Partial, cut: Cut, factor: float) -> None:
    if cut.n_splits == 0:
        return
    kv_heads = tokens.keys.shape[1]
    group = q.shape[1] // kv_heads
    plain_split[cut.n_splits, len(q) * kv_heads](
        q,
        tokens.keys.contiguous(),
        tokens.values.contiguous(),
        window(tokens, len(q), q.device),
        partial,
        cut.before,
        factor,
        tokens.n_tokens,
        cut.split_tokens,
        HEAD_DIM=q.shape[2],
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_TILE=group_tile(group),
        BLOCK=PLAIN_BLOCK,
        TYPE=product_type(tokens.keys.dtype),
        enable_fp_fusion=True,
    )


def _merged(q: Tensor, partial: Partial) -> Tensor:
    out = torch.empty_like(q)
    if partial.n_splits == 0:
        return out.zero_()
    batch, q_heads, head_dim = q.shape
    merge[batch * q_heads, head_dim // _MERGED_CHANNELS](
        partial,
        out,
        HEAD_DIM=head_dim,
        SPLITS_TILE=power_of_two(partial.n_splits),
        CHANNELS_TILE=_MERGED_CHANNELS,
        enable_fp_fusion=True,
    )
    return out
