"""Wrapper quantizer whose codes also hold the tokens that a cache keeps in full precision."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.exact_tokens import AbstractExactTokens


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class KeptExact(AbstractExactTokens):
    """Quantizer whose kept tokens are chosen from outside; part of a cache alone: no artifact holds it."""

    kind: ClassVar[str] = "kept_exact"

    @classmethod
    def around(cls, quantizer: Quantizer) -> "KeptExact":
        """Wrapper of the site's quantizer."""
        return cls(channels=quantizer.channels, site=quantizer.site, inner=quantizer)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.joined(self.inner.encode(x, context), x[none], none)
