"""Outliers at about half the bits: what the wrapped quantizer missed of them, in eight bits and an index in the head.

In `artifacts.quantizers.sparse` an outlier costs 16 bits for its value and 8 or 16 for its channel. Here, at head_dim
128, it costs 8 + 7, and a token no count: 1.5625 % of outliers (two a head) are 0.23 bits a value.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_vector
from artifacts.coding.packing import pack, unpack
from artifacts.quantizer import Context
from artifacts.quantizers.float8 import from_float8, to_float8
from artifacts.quantizers.sparse import furthest, move_to_edge
from artifacts.quantizers.wrapper import AbstractWrapper


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CompactSparse(AbstractWrapper):
    """Adds an 8-bit residual to the `outliers_per_head` values of each token and head that lie furthest out.

    The wrapped quantizer sees each head with its outliers moved to the edge of the rest; what it then misses of them is
    kept as float8 (e4m3: three bits of mantissa, so within 1/16 of itself), and is never enlarged by that.

    Parameters
    ----------
    head_dim : int
        Channels of a head, 2 to 256; a divisor of the channels.
    outliers_per_head : int
        From 1 to head_dim - 1; of equals, those of the first channels.
    value_scale : Float32[Tensor, "1"]
        Unit of the residuals, in units of x. They saturate at 448 times it and vanish below 2^-10 times it.
    """

    kind: ClassVar[str] = "compact_sparse"

    head_dim: int
    outliers_per_head: int
    value_scale: Float32[Tensor, "1"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.head_dim <= 256 or self.channels % self.head_dim:
            raise ValueError(
                f"{self.kind}: head_dim must be from 2 to 256 and divide {self.channels} channels; got {self.head_dim}"
            )
        if not 0 < self.outliers_per_head < self.head_dim:
            raise ValueError(
                f"{self.kind}: outliers_per_head must be from 1 to {self.head_dim - 1}; got {self.outliers_per_head}"
            )
        check_vector(self.kind, "value_scale", self.value_scale, 1, positive=True)

    def mask(self, x: Float32[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True at each head's largest deviations, as the wrapped quantizer measures them."""
        return furthest(self._heads(self.inner.deviation(x)), self.outliers_per_head).flatten(1)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        mask = self.mask(wide)
        channels = mask.nonzero(as_tuple=True)[1].view(len(x), self._outliers)
        dense = self.inner._encode(move_to_edge(self._heads(wide), self._heads(mask)).flatten(1), context)
        missed = (wide - self.inner._decode(dense, context)).gather(1, channels)
        tensors = {
            "indices": pack(channels % self.head_dim, self._index_bits),
            "values": to_float8(missed / self.value_scale, "e4m3"),
        }
        return Codes(tensors=tensors, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, inner=dense)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        x = self.inner._decode(codes.inner, context)
        missed = from_float8(codes.tensors["values"], "e4m3") * self.value_scale
        return x.scatter_add(1, self._channels(codes.tensors["indices"]), missed)

    def _heads(self, x: Tensor) -> Shaped[Tensor, "tokens heads head_dim"]:
        heads: Tensor = x.unflatten(1, (-1, self.head_dim))
        return heads

    @property
    def _outliers(self) -> int:
        return self.channels // self.head_dim * self.outliers_per_head

    @property
    def _index_bits(self) -> int:
        return (self.head_dim - 1).bit_length()

    def _channels(self, indices: UInt8[Tensor, "tokens bytes"]) -> Int64[Tensor, "tokens outliers"]:
        in_head = unpack(indices, self._index_bits, self._outliers).long()
        heads = torch.arange(self._outliers, device=indices.device) // self.outliers_per_head
        return in_head + heads * self.head_dim
