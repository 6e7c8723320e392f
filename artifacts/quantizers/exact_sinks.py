"""Attention sinks anywhere in a text, known by the small norm of their vectors and kept exact."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_vector
from artifacts.coding.exact_sums import norm
from artifacts.errors import InvalidValueError
from artifacts.quantizer import Context
from artifacts.quantizers.exact_tokens import AbstractExactTokens

LARGEST_NORM = torch.finfo(torch.float16).max
"""Largest norm that a kept token may have, so that its values fit float16."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ExactSinks(AbstractExactTokens):
    """Quantizer that keeps tokens of small norm in 16 bits, and leaves the others to the wrapped one.

    Tokens that much attention falls on, such as a second start token or delimiters, have values of small norm: an error
    of theirs counts with the weight of that attention. The norm is exact in any order of summation, so that a token's
    own vector decides, whatever its batch.

    Parameters
    ----------
    least_norm : Float32[Tensor, "1"]
        Smallest Euclidean norm of a token that is quantized, in units of x, up to 65504; tokens below it are kept.

    References
    ----------
    Small values of tokens that are attended to: arXiv 2406.12335; arXiv 2410.10781.
    """

    kind: ClassVar[str] = "exact_sinks"

    least_norm: Float32[Tensor, "1"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vector(self.kind, "least_norm", self.least_norm, 1, positive=True)
        if self.least_norm > LARGEST_NORM:
            raise InvalidValueError(
                f"{self.kind}: least_norm must be at most {LARGEST_NORM:g}, as tokens below it are stored in float16; "
                f"got {float(self.least_norm):g}"
            )

    def mask(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, " tokens"]:
        """True where a token is kept."""
        return norm(x.float())[:, 0] < self.least_norm

    def stored(self, x: Float[Tensor, "kept channels"]) -> Float[Tensor, "kept channels"]:
        """Kept tokens as they are stored: in their own 16 bits, or rounded to float16."""
        return x if x.element_size() == 2 else x.half()

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        kept = self.mask(x)
        # A stand-in is predicted from its own sources.
        sources = tuple(self.stand_ins(source, kept) for source in context)
        return self.joined(self.inner._encode(self.stand_ins(x, kept), sources), self.stored(x[kept]), kept)
