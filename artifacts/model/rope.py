"""Rotary position embedding (RoPE), in the variants that models use."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Rotation = Literal["half", "interleaved", "none"]
TableOrder = Literal["as_read", "halves", "once", "sines_first"]


def position_tables(module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """Tables (cos, sin) of a call of an attention module: an argument, or of the module's own.

    The argument may be complex, exp(i angle) (Llama 4). A module of its own tables looks them up (CodeGen), or has a
    child that computes them (RecurrentGemma).
    """
    positions, table = kwargs.get("position_ids"), getattr(module, "embed_positions", None)
    own = getattr(module, "rotary_emb", None)
    if isinstance(positions, Tensor) and isinstance(table, Tensor):
        sin, cos = table.to(positions.device)[positions].chunk(2, dim=-1)
        return cos, sin
    if isinstance(positions, Tensor) and isinstance(own, nn.Module) and kwargs.get("position_embeddings") is None:
        return own(next(module.parameters()), positions)
    given = kwargs.get("position_embeddings")
    return (given.real, given.imag) if isinstance(given, Tensor) and given.is_complex() else given


def cos_sin(tables: Sequence[Tensor], order: TableOrder) -> Sequence[Tensor]:
    """Tables in the order cosines, sines."""
    return tables[::-1] if order == "sines_first" else tables


def spread(table: Tensor, order: TableOrder, rotation: Rotation) -> Tensor:
    """Table of cosines or sines expanded to one entry per rotated channel, in the order of the channels.

    Parameters
    ----------
    table : Tensor
        Table of the model, its last axis in the layout `order`.
    order : {'as_read', 'halves', 'once', 'sines_first'}
        See `AttentionLayer`.
    rotation : {'half', 'interleaved', 'none'}
        Pairing of the channels.
    """
    # Both channels of a pair turn by the same angle: pairs (d, d + n/2) read the frequencies twice in a row, pairs
    # (2d, 2d + 1) read each frequency twice.
    if order == "as_read":
        return table
    once = table[..., : table.shape[-1] // 2] if order == "halves" else table
    return torch.cat([once, once], dim=-1) if rotation == "half" else once.repeat_interleave(2, dim=-1)


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    cos: Float[Tensor, "#batch tokens rotary_dim"],
    sin: Float[Tensor, "#batch tokens rotary_dim"],
    rotation: Rotation,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """`x` after the rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) for each pair of channels.

    Parameters
    ----------
    x : Tensor
        Keys or queries before rotation.
    cos, sin : Tensor
        One entry per rotated channel, from `AttentionLayer.tables`. Channels beyond `rotary_dim` are unchanged.
    rotation : {'half', 'interleaved', 'none'}
        Pairing of the channels; 'none' returns `x`.

    References
    ----------
    arXiv:2104.09864, equation 34 (interleaved).

    Examples
    --------
    >>> x, cos, sin = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> rotate(x, cos, sin, "half").tolist()
    [[[[-2.0, 1.0, 3.0]]]]
    """
    if rotation == "none":
        return x
    # A model spread over devices moves the tables inside the attention module, after our hooks have seen them.
    cos, sin = cos.to(x.device).unsqueeze(1), sin.to(x.device).unsqueeze(1)
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    # R (a, b) = cos (a, b) + sin J (a, b) with the quarter turn J (a, b) = (-b, a). R is orthogonal, so the inverse is
    # the same formula with -sin.
    if rotation == "half":
        a, b = turning.chunk(2, dim=-1)
        quarter_turn = torch.cat([-b, a], dim=-1)
    else:
        a, b = turning[..., ::2], turning[..., 1::2]
        quarter_turn = torch.stack([-b, a], dim=-1).flatten(-2)
    return torch.cat([(turning * cos + quarter_turn * sin).to(x.dtype), still], dim=-1)
