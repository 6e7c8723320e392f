"""Cached tokens as the attention kernels take them: packed, or as they are."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizer import Quantizer

Live = tuple[Integer[Tensor, " batch"], Integer[Tensor, " batch"]]
"""First live token of each sequence, and the one behind its last."""

Tables = tuple[Float[Tensor, "#batch tokens head_dim"], Float[Tensor, "#batch tokens head_dim"]]


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Keys and values of one layer as their quantizers stored them.

    Parameters
    ----------
    key_quantizer, value_quantizer : Quantizer
        Affine, Codebook, or DynamicAffine per token or per channel; 1, 2, 3, 4 or 8 bits.
    keys, values : Codes
        Of ``batch * tokens`` rows, those of a sequence one after the other.
    batch : int
        Number of sequences.
    live : tuple[Tensor, Tensor] or None
        First live token of each sequence (after its padding), and the one behind its last; None for all.
    tables : tuple[Tensor, Tensor] or None
        Cosines and sines of the rotary embedding at each token, the two halves of `head_dim` alike (rotation 'half'),
        where keys were encoded before it; None where after.
    """

    key_quantizer: Quantizer
    keys: Codes
    value_quantizer: Quantizer
    values: Codes
    batch: int = 1
    live: Live | None = None
    tables: Tables | None = None

    def __post_init__(self) -> None:
        if self.keys.shape != self.values.shape or self.batch < 1 or self.keys.shape[0] % self.batch:
            raise ValueError(
                f"PackedTokens: keys and values must have the same shape, of a whole number of rows for each of "
                f"{self.batch} sequences; got {self.keys.shape} and {self.values.shape}"
            )

    @property
    def n_tokens(self) -> int:
        """Tokens of a sequence, padding included."""
        return self.keys.shape[0] // self.batch


@dataclass(frozen=True, kw_only=True)
class PlainTokens:
    """Keys and values of one layer as they are: sinks and the recent window, or a whole cache.

    Parameters
    ----------
    keys, values : Float[Tensor, "batch kv_heads tokens head_dim"]
        Keys after the rotary embedding.
    live : tuple[Tensor, Tensor] or None
        First live token of each sequence, and the one behind its last; None for all.
    """

    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens head_dim"]
    live: Live | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of a sequence, padding included."""
        return self.keys.shape[2]


class Window(NamedTuple):
    """`Live` as the programs read it."""

    first: Any
    last: Any


def window(tokens: PackedTokens | PlainTokens, batch: int, device: torch.device) -> Window:
    """The live tokens of each sequence, within those that there are."""
    n_tokens = tokens.n_tokens
    everything = (torch.zeros(batch, device=device), torch.full((batch,), n_tokens, device=device))
    first, last = tokens.live or everything
    if len(first) != batch or len(last) != batch:
        raise ValueError(
            f"decode_attention: live must hold two tensors of {batch} sequences; got {len(first)} and {len(last)}"
        )
    ends = (end.to(device, torch.int32).clamp(0, n_tokens) for end in (first, last))
    return Window(*ends)
