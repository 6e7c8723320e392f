"""Minimal custom quantizer, explained in `notebooks/add_your_own_quantizer.ipynb`."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_bits
from artifacts.coding.packing import pack, unpack
from artifacts.coding.rounding import round_outward
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.affine import top_code


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SquareLevels(Quantizer):
    """Non-uniform quantizer with levels close together around zero: x ~ peak * s * |s|, where s = 2 * code / top - 1.

    The scale of a token is its largest magnitude, the peak, in float16. The number of levels is odd, with zero in the
    middle.

    Parameters
    ----------
    bits : int
        Code width, 2 to 8.
    """

    kind: ClassVar[str] = "square_levels"

    bits: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits, least=2)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        peak = round_outward(wide.abs().amax(dim=1, keepdim=True), up=True, who=self.label, positive=True)
        share = wide / peak.float()  # peak is rounded up, so that shares are within [-1, 1]
        codes = ((share.abs().sqrt().copysign(share) + 1) * self._middle).round().to(torch.uint8)
        return Codes(
            tensors={"codes": pack(codes, self.bits), "peak": peak}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype
        )

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        share = unpack(codes.tensors["codes"], self.bits, codes.shape[1]).float() / self._middle - 1
        return codes.tensors["peak"].float() * share * share.abs()

    @property
    def _middle(self) -> int:
        """Code of zero: half the top code."""
        return top_code(self.bits, symmetric=True) // 2
