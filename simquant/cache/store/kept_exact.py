"""Codes that hold some of their tokens as they are, too."""

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
    """Reads some tokens as they were, and the others from the codes that a quantizer gives for all.

    Every token has its place in the codes, so that groups stay whole; both are counted. In a group of several tokens
    the place of a kept one is filled with another token of the group, whose scales it would stretch otherwise. It is
    part of a cache only: no file holds it.

    Parameters
    ----------
    inner : Quantizer
        That of the site.
    """

    kind: ClassVar[str] = "kept_exact"

    @classmethod
    def around(cls, quantizer: Quantizer) -> "KeptExact":
        """For the site of `quantizer`."""
        return cls(channels=quantizer.channels, site=quantizer.site, inner=quantizer)

    def stand_ins(
        self, x: Float[Tensor, "tokens channels"], kept: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens channels"]:
        """What the quantizer sees: kept tokens replaced by the first one of their group that is not."""
        size = self.tokens_per_scale or 1
        if size == 1 or not kept.any():
            return x
        places = torch.arange(len(x), device=x.device).view(-1, size)
        first = places.gather(1, (~kept).view(-1, size).int().argmax(dim=1, keepdim=True))
        return x[torch.where(kept.view(-1, size), first, places).flatten()]

    def joined(self, codes: Codes, x: Float[Tensor, "tokens channels"], kept: Bool[Tensor, " tokens"]) -> Codes:
        """The codes of all tokens, and beside them those of `x` that are kept."""
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
