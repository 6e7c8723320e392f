"""Normalisation of tokens or heads around another quantizer."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float, Float16, Float32
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_group
from artifacts.coding.exact_sums import norm
from artifacts.coding.rounding import nearest_half
from artifacts.errors import InvalidValueError
from artifacts.quantizer import Context
from artifacts.quantizers.wrapper import AbstractWrapper

_SMALLEST_HALF = torch.finfo(torch.float16).smallest_normal / 1024


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Normalised(AbstractWrapper):
    """Divides each group of channels of a token by its norm before quantization and stores the norm in float16.

    The stored number is the root mean square, norm / sqrt(group width), which fits float16 wherever the values do. A
    group of zeros is decoded to zeros.

    Parameters
    ----------
    group_size : int or None
        Channels with one norm: a divisor of the channels, head_dim for one norm per head; None for the whole token.
    target : {'unit_variance', 'unit_norm'}
        Normalise groups to a mean square of 1, or to a norm of 1.
    correct : bool
        Norm correction: store the factor that gives the decoded group the norm of x, rather than the divisor of x.

    References
    ----------
    Norms beside codes of directions: arXiv 2504.19874, algorithm 1; per token before per-channel codes: 2605.19660.
    """

    kind: ClassVar[str] = "normalised"

    group_size: int | None = None
    target: Literal["unit_variance", "unit_norm"] = "unit_variance"
    correct: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None:
            check_group(self.kind, self.group_size, self.channels)
        if self.target not in ("unit_variance", "unit_norm"):
            raise InvalidValueError(f"{self.kind}: target must be 'unit_variance' or 'unit_norm'; got {self.target!r}")

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        # Divide by the norm as stored in float16, the number that decoding multiplies by: its rounding cancels.
        scale = self._half(self._sizes(wide))
        dense = self.inner._encode(self._divide(wide, scale), context)
        if self.correct:
            scale = self._corrected(wide, scale, self.inner._decode(dense, context))
        return Codes(tensors={"scale": scale}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, inner=dense)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        return self.inner._decode(codes.inner, context) * self._per_channel(codes.tensors["scale"])

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Outlier score of the wrapped quantizer for the normalised values."""
        return self.inner.outlier_score(self._divided(x))

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
        """Range check of the wrapped quantizer for the normalised values."""
        return self.inner.outside(self._divided(x))

    def _divided(self, x: Float[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """Normalised values: the input of the wrapped quantizer."""
        wide = x.float()
        return self._divide(wide, self._half(self._sizes(wide)))

    @property
    def _width(self) -> int:
        return self.channels if self.group_size is None else self.group_size

    @property
    def _unit(self) -> float:
        """Factor between the stored root mean square and the norm that becomes 1."""
        # norm = sqrt(width) * root mean square, so unit_norm divides by sqrt(width) more than unit_variance.
        return 1.0 if self.target == "unit_variance" else math.sqrt(self._width)

    def _sizes(self, x: Float32[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens groups"]:
        """Root mean square of each group."""
        norms: Tensor = norm(x.unflatten(1, (-1, self._width))).squeeze(2)
        return norms / math.sqrt(self._width)

    def _half(self, sizes: Float32[Tensor, "tokens groups"]) -> Float16[Tensor, "tokens groups"]:
        return nearest_half(sizes, who=self.label)

    def _divide(
        self, x: Float32[Tensor, "tokens channels"], scale: Float16[Tensor, "tokens groups"]
    ) -> Float32[Tensor, "tokens channels"]:
        # A group whose norm rounds to zero in float16 is divided by the smallest number and decoded to zeros.
        return x / self._per_channel(scale.clamp_min(_SMALLEST_HALF))

    def _per_channel(self, scale: Float16[Tensor, "tokens groups"]) -> Float32[Tensor, "tokens channels"]:
        return (self._unit * scale.float()).repeat_interleave(self._width, dim=1)

    def _corrected(
        self,
        x: Float32[Tensor, "tokens channels"],
        scale: Float16[Tensor, "tokens groups"],
        decoded: Float32[Tensor, "tokens channels"],
    ) -> Float16[Tensor, "tokens groups"]:
        """Factor that restores the norm of x; `scale` where the group is decoded to zeros."""
        # Quantizing shrinks: with centroids as levels E|x'|^2 = (1 - D) |x|^2, D the relative distortion (Max 1960).
        # s' = rms(x) / rms(decoded) makes the norms equal and stores no more bytes than s.
        sizes = self._unit * self._sizes(decoded)
        return self._half(torch.where(sizes > 0, self._sizes(x) / sizes, scale.float()))
