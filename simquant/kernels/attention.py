"""Attention of one query token over packed keys and values, split over the tokens."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizer import Quantizer
from simquant.kernels.attention_programs import packed_split
from simquant.kernels.language import constexpr, product_type
from simquant.kernels.sharing import Sharing, side

_BLOCK = 128
"""Tokens that a program holds at a time."""

_LEAST_BLOCK, _LEAST_GROUP = 16, 8
"""What the tensor cores take at least, of tokens and of query heads."""

_WAVES, _MOST_SPLITS = 4, 64
"""Programs per multiprocessor: more hide the latency of memory, fewer leave less to join; and parts of a sequence."""


class Block(NamedTuple):
    """Neighbouring tokens of a cache, as their quantizers stored them.

    Parameters
    ----------
    keys, values : Codes
        Of the tokens, and perhaps of others behind them.
    n_tokens : int
        Tokens to attend to.
    tables : Float[Tensor, "2 tokens head_dim"] or None
        Cosines and sines of the tokens (rotation 'half') where keys were encoded before RoPE.
    """

    keys: Codes
    values: Codes
    n_tokens: int
    tables: Tensor | None


class Partial(NamedTuple):
    """Unnormalized sums of every split, their largest scores and their weights."""

    acc: Any
    peak: Any
    total: Any
    n_splits: int


class Geometry(NamedTuple):
    """Constants that `packed_split` is compiled for; its docstring explains the folds.

    Parameters
    ----------
    channels, head_dim, group, group_tile, block : int
        Channels of a row, of a head, query heads of a KV head, the same as a power of two, tokens of a tile.
    key_fold, value_fold : {'static', 'span', 'token', 'none'} or 'rotated'
        Where scales go.
    step_type, value_type : Triton dtype
        What is multiplied where scales are folded, and where they are not.
    """

    channels: Any
    head_dim: Any
    group: Any
    group_tile: Any
    block: Any
    key_fold: Any
    value_fold: Any
    step_type: Any
    value_type: Any


def attend_packed(
    q: Float[Tensor, "q_heads head_dim"],
    quantizers: tuple[Quantizer, Quantizer],
    blocks: Sequence[Block],
    scaling: float,
) -> tuple[Float[Tensor, "q_heads splits head_dim"], Float[Tensor, "q_heads splits"], Float[Tensor, "q_heads splits"]]:
    """Softmax attention in splits: sums of exp(score - largest) value, largest scores, and sums of the weights.

    Codes are read where they are stored and never dequantized in memory. Scales that all tokens of a tile share are
    multiplied into the query, those of a token's head into its score or weight; a narrower group scales each value.
    What is multiplied is float16 (of the dtype of `q` where values are scaled one by one, float32 where `q` is), what
    is summed float32.

    Parameters
    ----------
    q : Float[Tensor, "q_heads head_dim"]
        Queries after RoPE.
    quantizers : pair of Quantizer
        Of keys and of values; `support.reads` says which.
    blocks : sequence of Block
        At least one, each of at least one token.
    scaling : float
        Of the scores.

    References
    ----------
    Splits and their sums: arXiv:2311.01282, section 3.
    """
    q, kv_heads = q.contiguous(), quantizers[0].channels // q.shape[1]
    lean = blocks[0].tables is not None or q.dtype == torch.float32  # wide tiles fit shared memory only if small
    geometry = _geometry(q, quantizers, blocks[0].tables is not None, _BLOCK // 2 if lean else _BLOCK)
    split_tokens = _split_tokens(sum(block.n_tokens for block in blocks), kv_heads, q.device)
    cuts = [-(-block.n_tokens // split_tokens) for block in blocks]
    shape = (len(q), sum(cuts))
    peak, total = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    partial = Partial(torch.empty(*shape, q.shape[1], dtype=torch.float32, device=q.device), peak, total, sum(cuts))
    # Triton starts programs on the current device, which need not be that of the layer.
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        for number, (block, cut) in enumerate(zip(blocks, cuts, strict=True)):
            cosine, sine = (None, None) if block.tables is None else block.tables.contiguous()
            packed_split[cut, kv_heads](
                q,
                side(quantizers[0], block.keys, constexpr),
                side(quantizers[1], block.values, constexpr),
                cosine,
                sine,
                partial,
                sum(cuts[:number]),
                scaling * math.log2(math.e),
                block.n_tokens,
                split_tokens,
                geometry,
                enable_fp_fusion=True,
                num_stages=1 if lean else 3,
            )
    return partial.acc, peak * math.log(2), total


def _split_tokens(n_tokens: int, kv_heads: int, device: torch.device) -> int:
    """Tokens of a split, whole tiles: so many splits that every multiprocessor has its programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    splits = min(_MOST_SPLITS, max(1, _WAVES * processors // kv_heads))
    return -(-n_tokens // (splits * _BLOCK)) * _BLOCK


def _geometry(q: Tensor, quantizers: tuple[Quantizer, Quantizer], rotated: bool, block: int) -> Geometry:
    head_dim, channels = q.shape[1], quantizers[0].channels
    sharings = [Sharing.of(quantizer) for quantizer in quantizers]
    for span in (sharing.span for sharing in sharings if sharing.span > 1):
        within = min(block, span & -span)  # the most tokens of a tile that lie within one span
        block = within if within >= _LEAST_BLOCK else block
    folds = [_fold(sharing, head_dim, block) for sharing in sharings]
    group = q.shape[0] * head_dim // channels
    tile = max(_LEAST_GROUP, 1 << (group - 1).bit_length())  # padded heads idle in this kernel anyway
    # float16 holds codes and levels exactly.
    step_type = product_type(torch.float32 if q.dtype == torch.float32 else torch.float16)
    choices = (channels, head_dim, group, tile, block, "rotated" if rotated else folds[0], folds[1], step_type)
    return Geometry(*(constexpr(choice) for choice in (*choices, product_type(q.dtype))))


def _fold(sharing: Sharing, head_dim: int, block: int) -> str:
    if sharing.per_row == 0:
        return "static"
    if sharing.span == 1:
        return "token" if sharing.group % head_dim == 0 else "none"
    return "span" if sharing.span % block == 0 else "none"
