"""Costs of a quantized cache: stored bits, static bytes, and the arithmetic of decoding."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from artifacts.quantizer import Quantizer
from artifacts.sites import Site


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of all sites together.

    Parameters
    ----------
    bits_per_token : float
        Stored bits of a token, averaged over encoded and full-precision tokens.
    static_share : float
        Bytes stored once, as a share of the bytes of the model's weights.
    decode_multiply_adds : int
        Multiply-adds to decode one token.
    model_multiply_adds : int
        Multiply-adds of one token in the model's linear layers, without attention.
    """

    bits_per_token: float
    static_share: float
    decode_multiply_adds: int
    model_multiply_adds: int

    @classmethod
    def of(cls, model: nn.Module, quantizers: Mapping[Site, Quantizer], bits: float) -> "Costs":
        """Costs of quantizers in a model, given the mean bits per element."""
        # A linear layer of n x m weights takes n * m multiply-adds per token. Attention is left out, since it grows
        # with the context; decoding a token's codes is compared with the part of a step that does not.
        weights = sum(parameter.nbytes for parameter in model.parameters())
        return cls(
            bits_per_token=bits * sum(quantizer.channels for quantizer in quantizers.values()),
            static_share=sum(quantizer.static_bytes for quantizer in quantizers.values()) / weights,
            decode_multiply_adds=sum(quantizer.decode_multiply_adds for quantizer in quantizers.values()),
            model_multiply_adds=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        )

    @property
    def decode_share(self) -> float:
        """Multiply-adds to decode a token as a share of those of the linear layers; NaN without linear layers."""
        return self.decode_multiply_adds / self.model_multiply_adds if self.model_multiply_adds else math.nan

    def describe(self) -> str:
        """Line for tables."""
        line = (
            f"{self.bits_per_token:,.0f} bits stored, static bytes {self.static_share:.2%} of the weights, "
            f"{self.decode_multiply_adds:,} multiply-adds to decode"
        )
        return f"{line}, {self.decode_share:.2%} of the linear layers'" if self.model_multiply_adds else line
