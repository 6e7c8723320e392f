"""Tokens, or their heads, without their norm."""

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
from artifacts.quantizer import Context
from artifacts.quantizers.wrapper import AbstractWrapper

_SMALLEST_HALF = torch.finfo(torch.float16).smallest_normal / 1024


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Normalised(AbstractWrapper):
    """The wrapped quantizer sees each token's groups of channels divided by their norms, kept in float16.

    What is kept is norm / sqrt(group width), which fits wherever the values do. A group of zeros comes back as zeros.

    Parameters
    ----------
    group_size : int or None
        Channels that share a norm: a divisor of the channels, head_dim for one norm a head; None for the whole token.
    target : {'unit_variance', 'unit_norm'}
        What the wrapped quantizer sees: groups whose mean square is 1, or whose norm is.
    correct : bool
        Keep the number that gives the decoded group the norm of x, rather than the one that x was divided by.

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
            raise ValueError(f"{self.kind}: target must be 'unit_variance' or 'unit_norm'; got {self.target!r}")

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        scale = self._half(self._sizes(wide))
        dense = self.inner._encode(self._divide(wide, scale), context)
        if self.correct:
            scale = self._corrected(wide, scale, self.inner._decode(dense, context))
        return Codes(tensors={"scale": scale}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, inner=dense)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        return self.inner._decode(codes.inner, context) * self._per_channel(codes.tensors["scale"])

    def deviation(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """That of the wrapped quantizer, after division by the norms."""
        return self.inner.deviation(self._divided(x))

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"] | None:
        """Where the wrapped quantizer's range ends, after division by the norms."""
        return self.inner.outside(self._divided(x))

    def _divided(self, x: Float[Tensor, "tokens channels"]) -> Float32[Tensor, "tokens channels"]:
        """What the wrapped quantizer sees."""
        wide = x.float()
        return self._divide(wide, self._half(self._sizes(wide)))

    @property
    def _width(self) -> int:
        return self.channels if self.group_size is None else self.group_size

    @property
    def _unit(self) -> float:
        """What the wrapped quantizer's one is in root mean squares."""
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
        return x / self._per_channel(scale.clamp_min(_SMALLEST_HALF))

    def _per_channel(self, scale: Float16[Tensor, "tokens groups"]) -> Float32[Tensor, "tokens channels"]:
        return (self._unit * scale.float()).repeat_interleave(self._width, dim=1)

    def _corrected(
        self,
        x: Float32[Tensor, "tokens channels"],
        scale: Float16[Tensor, "tokens groups"],
        decoded: Float32[Tensor, "tokens channels"],
    ) -> Float16[Tensor, "tokens groups"]:
        """What gives the reconstruction the norm of x; `scale` itself where all codes mean zero."""
        sizes = self._unit * self._sizes(decoded)
        return self._half(torch.where(sizes > 0, self._sizes(x) / sizes, scale.float()))
