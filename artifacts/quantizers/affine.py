"""Uniform quantizers with static scales: x ~ offset + scale * code.

The offset takes the place of a zero point (zero_point = -offset / scale): in 16 bits an unclamped zero point of a
narrow range far from zero is wrong by whole steps, an offset never by more than its own rounding.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_bits, check_vector
from artifacts.coding.packing import pack, unpack
from artifacts.quantizer import RANGE_SLACK, Context, Quantizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Quantizer):
    """Uniform quantizer with a static scale per channel: x ~ offset + scale * code, code in 0 .. 2^bits - 1.

    Parameters
    ----------
    bits : int
        Code width, 1 to 8.
    scale, offset : Float32[Tensor, "channels"]
        Step and smallest reconstructed value of each channel, in units of x. Without an offset the quantizer is
        symmetric: codes stand for -(2^(bits-1) - 1) .. 2^(bits-1) - 1 steps.
    """

    kind: ClassVar[str] = "affine"

    bits: int
    scale: Float32[Tensor, " channels"]
    offset: Float32[Tensor, " channels"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits, least=1 if self.offset is not None else 2)
        check_vector(self.kind, "scale", self.scale, self.channels, positive=True)
        if self.offset is not None:
            check_vector(self.kind, "offset", self.offset, self.channels)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        # x = scale * (q - zero_point) with zero_point = -offset / scale (arXiv 1712.05877, equation 1), solved for q.
        top = top_code(self.bits, symmetric=self.offset is None)
        steps = ((x.float() - self._offset) / self.scale).round_().clamp_(0, top)
        codes = pack(steps.to(torch.uint8), self.bits)
        return Codes(tensors={"codes": codes}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        steps = unpack(codes.tensors["codes"], self.bits, codes.shape[1])
        if self.offset is None:  # one product, so that a step itself comes back without rounding
            return self.scale * (steps.float() - top_code(self.bits, symmetric=True) / 2)
        return self.offset + self.scale * steps

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Distance from the middle of the channel's range, in steps."""
        steps: Tensor = (x - self._offset) / self.scale
        return (steps - top_code(self.bits, symmetric=self.offset is None) / 2).abs()

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True beyond the first and the last code."""
        return self.outlier_score(x.float()) > RANGE_SLACK * top_code(self.bits, symmetric=self.offset is None) / 2

    @property
    def _offset(self) -> Float32[Tensor, " channels"]:
        return self.offset if self.offset is not None else symmetric_offset(self.scale, self.bits)


def top_code(bits: int, *, symmetric: bool) -> int:
    """Largest code in use; a symmetric range leaves one code out, so that its middle code is zero."""
    # 2^bits - 1 codes, an odd number, have a middle: -127 .. 127 rather than -128 .. 127 (arXiv 2004.09602, section 3).
    codes: int = 2**bits
    return codes - 2 if symmetric else codes - 1


def symmetric_offset(scale: Tensor, bits: int) -> Tensor:
    """Value of code 0 in a symmetric quantizer: minus half the code range."""
    return -(top_code(bits, symmetric=True) // 2) * scale
