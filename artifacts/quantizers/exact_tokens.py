"""Base class of wrappers whose codes also hold some tokens as they came."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.span import Span
from artifacts.quantizer import Context
from artifacts.quantizers.wrapper import AbstractWrapper


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractExactTokens(AbstractWrapper):
    """Base of quantizers that decode kept tokens to stored values, and the others from the inner codes.

    Every token has codes, so that groups of tokens stay whole; the bytes of both are counted. The wrapped quantizer
    gets tokens in the dtype in which they came: its codes are those that it has alone.
    """

    def stand_ins(
        self, x: Float[Tensor, "tokens channels"], kept: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens channels"]:
        """Rows to encode: each kept token replaced by the first token of its group that is not kept."""
        # A kept token's codes are never read, but its values would widen the range of the group's shared scale. Another
        # token of the group leaves the range as the others make it. In a group kept whole, argmax gives its first.
        size = self.tokens_per_scale or len(x)
        if size == 1 or not kept.any():
            return x
        n_groups = -(-len(x) // size)
        places = torch.arange(n_groups * size, device=x.device).view(n_groups, size)
        whole = kept.new_ones(n_groups * size)  # the last group may be shorter: what it lacks is never chosen
        whole[: len(x)] = kept
        first = places.gather(1, (~whole).view(n_groups, size).int().argmax(dim=1, keepdim=True))
        return x[torch.where(whole.view(n_groups, size), first, places).flatten()[: len(x)]]

    def joined(self, codes: Codes, values: Float[Tensor, "kept channels"], kept: Bool[Tensor, " tokens"]) -> Codes:
        """Inner codes of all tokens, with the values of the kept ones beside them."""
        # "counts" says per token if it is kept (0 or 1), so that codes can be cut, joined and selected token by token.
        exact = {"counts": kept.to(torch.uint8), "values": values}
        spans = {"values": Span(entries="counts")}
        return Codes(tensors=exact, shape=codes.shape, dtype=codes.dtype, spans=spans, inner=codes)

    def exact_tokens(self, codes: Codes) -> Bool[Tensor, " tokens"]:
        """True at kept tokens, and at those that the wrapped quantizer keeps."""
        own, inside = codes.tensors["counts"].bool(), super().exact_tokens(codes)
        return own if inside is None else own | inside

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        x, values = self.inner.decode(codes.inner, context), codes.tensors["values"]
        kept = codes.tensors["counts"].bool()
        return x.masked_scatter(kept[:, None], values.to(x.dtype)) if len(values) else x
