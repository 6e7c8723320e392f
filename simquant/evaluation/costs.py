"""What a cached token takes besides its loss: bits, what is stored once, and the arithmetic of reading it back."""

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
        Stored for a token, tokens that the policy keeps exact included.
    static_share : float
        Bytes that are stored once, over those of the model's weights.
    decode_multiply_adds : int
        To decode one token.
    model_multiply_adds : int
        Of a token in the model's linear layers, attention itself left out.
    """

    bits_per_token: float
    static_share: float
    decode_multiply_adds: int
    model_multiply_adds: int

    @classmethod
    def of(cls, model: nn.Module, quantizers: Mapping[Site, Quantizer], bits: float) -> "Costs":
        """Of quantizers in a model, with so many bits per element in the mean."""
        weights = sum(parameter.nbytes for parameter in model.parameters())
        return cls(
            bits_per_token=bits * sum(quantizer.channels for quantizer in quantizers.values()),
            static_share=sum(quantizer.static_bytes for quantizer in quantizers.values()) / weights,
            decode_multiply_adds=sum(quantizer.decode_multiply_adds for quantizer in quantizers.values()),
            model_multiply_adds=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        )

    @property
    def decode_share(self) -> float:
        """Multiply-adds to decode a token, over those of the linear layers; not a number where there are none."""
        return self.decode_multiply_adds / self.model_multiply_adds if self.model_multiply_adds else math.nan

    def describe(self) -> str:
        """One line for people."""
        line = (
            f"{self.bits_per_token:,.0f} bits stored, static bytes {self.static_share:.2%} of the weights, "
            f"{self.decode_multiply_adds:,} multiply-adds to decode"
        )
        return f"{line}, {self.decode_share:.2%} of the linear layers'" if self.model_multiply_adds else line
