"""Wrapper quantizer whose codes also hold some tokens in full precision."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.span import Span
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.wrapper import AbstractWrapper


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class KeptExact(AbstractWrapper):
    """Quantizer that decodes kept tokens to their full-precision values, and the others from the inner codes.

    Every token has codes, so that groups of tokens stay whole; the bytes of both are counted. Part of a cache alone: no
    artifact holds it.

    Parameters
    ----------
    inner : Quantizer
        Quantizer of the site.
    """

    kind: ClassVar[str] = "kept_exact"

    @classmethod
    def around(cls, quantizer: Quantizer) -> "KeptExact":
        """Wrapper of the site's quantizer."""
        return cls(channels=quantizer.channels, site=quantizer.site, inner=quantizer)

    def stand_ins(
        self, x: Float[Tensor, "tokens channels"], kept: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens channels"]:
        """Rows to encode: each kept token replaced by the first token of its group that is not kept."""
        # A kept token's codes are never read, but its values would widen the range of the group's shared scale. Another
        # token of the group leaves the range as the others make it. In a group kept whole, argmax gives its first.
        size = self.tokens_per_scale or 1
        if size == 1 or not kept.any():
            return x
        places = torch.arange(len(x), device=x.device).view(-1, size)
        first = places.gather(1, (~kept).view(-1, size).int().argmax(dim=1, keepdim=True))
        return x[torch.where(kept.view(-1, size), first, places).flatten()]

    def joined(self, codes: Codes, x: Float[Tensor, "tokens channels"], kept: Bool[Tensor, " tokens"]) -> Codes:
        """Codes of all tokens, with the kept rows of `x` beside them."""
        # "counts" says per token if it is kept (0 or 1), so that codes can be cut, joined and selected token by token.
        exact = {"counts": kept.to(torch.uint8), "values": x[kept]}
        spans = {"values": Span(entries="counts")}
        return Codes(tensors=exact, shape=codes.shape, dtype=codes.dtype, spans=spans, inner=codes)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.joined(self.inner.encode(x, context), x, none)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        x = self.inner.decode(codes.inner, context)
        kept = codes.tensors["counts"].bool()
        return x.masked_scatter(kept[:, None], codes.tensors["values"]) if len(codes.tensors["values"]) else x
