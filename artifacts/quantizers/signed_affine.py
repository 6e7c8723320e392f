"""Symmetric block quantizer with a signed scale (llama.cpp's q4_0)."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_bits, check_group
from artifacts.coding.packing import pack, unpack
from artifacts.coding.rounding import nearest_half
from artifacts.quantizer import Context, Quantizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SignedAffine(Quantizer):
    """Uniform quantizer x ~ scale * (code - 2^(bits-1)), with a scale per block that maps the extreme value to code 0.

    The scale is negative where that value is positive, so the extreme is always exact up to the rounding of the scale,
    and all 2^bits codes are in use. With 4 bits and blocks of 32 this is llama.cpp's q4_0: 4.5 bits per element.

    Parameters
    ----------
    bits : int
        Code width, 2 to 8.
    group_size : int
        Consecutive channels of a token with one scale; divides the channels.
    """

    kind: ClassVar[str] = "signed_affine"

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits, least=2)
        check_group(self.kind, self.group_size, self.channels)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        blocks = x.float().unflatten(1, (-1, self.group_size))
        # scale = extreme / -2^(b-1): code = x / scale + 2^(b-1) is 0 at the extreme. The opposite sign ends one code
        # short of -extreme, at 2^(b-1) - 1 steps, where it saturates (ggml `quantize_row_q4_0_ref`).
        extreme = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
        scale = nearest_half(extreme / -self._middle, who=self.label)
        step = scale.float()
        steps = torch.where(step == 0, 0.0, blocks / step).round_() + self._middle
        codes = pack(steps.clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(1), self.bits)
        return Codes(tensors={"codes": codes, "scale": scale[..., 0]}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        steps = unpack(codes.tensors["codes"], self.bits, codes.shape[1]).float() - self._middle
        x: Tensor = codes.tensors["scale"].float()[..., None] * steps.unflatten(1, (-1, self.group_size))
        return x.flatten(1)

    @property
    def _middle(self) -> int:
        half: int = 2 ** (self.bits - 1)
        return half
