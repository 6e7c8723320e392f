"""Block floating point (MXFP4, NVFP4): x ~ scale * element, with 4-bit elements and an 8-bit scale per block."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_vector
from artifacts.coding.packing import pack, unpack
from artifacts.errors import InvalidValueError
from artifacts.quantizer import Context, Quantizer
from artifacts.quantizers.codebook import look_up
from artifacts.quantizers.float8 import from_float8, largest_float8, largest_of_blocks, over_channels, to_float8

BlockFormat = Literal["mxfp4", "nvfp4"]
_BLOCK_SIZES: dict[BlockFormat, int] = {"mxfp4": 32, "nvfp4": 16}

_MAGNITUDES = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6]], dtype=torch.float16)
_ELEMENTS = torch.cat([_MAGNITUDES, -_MAGNITUDES], dim=1)
"""Values of the 16 E2M1 codes; the highest bit of a code is the sign."""

_BITS = 4
_LARGEST_ELEMENT = 6.0
_LEAST_BLOCK_SCALE = 2.0**-9
"""Smallest positive e4m3 number, the least scale of an NVFP4 block; blocks far below the tensor's maximum need it."""

LARGEST_PER_TENSOR_SCALE = _LARGEST_ELEMENT * largest_float8("e4m3")
"""Largest magnitude that nvfp4 can decode, in units of the tensor's scale."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class BlockFloat(Quantizer):
    """Quantizer to E2M1 elements (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) with one scale per block.

    Elements are rounded to nearest, ties to the even code; magnitudes above 6 scales saturate.

    Blocks are consecutive channels of a token, counted through its heads; the last one may be shorter.

    Parameters
    ----------
    format : {'mxfp4', 'nvfp4'}
        Blocks of 32 with a power of two as scale, 2^(floor(log2(largest magnitude)) - 2); or blocks of 16 with a
        scale of `tensor_scale` times a float8 (e4m3), which is largest magnitude / 6 / `tensor_scale`.
    tensor_scale : Float32[Tensor, "1"] or None
        With nvfp4 only: the site's largest magnitude / (6 * 448), in units of x. Larger magnitudes saturate.

    References
    ----------
    OCP Microscaling Formats (MX) v1.0, section 6.3, and arXiv 2310.10537, algorithm 1, for mxfp4; arXiv 2509.25149 for
    nvfp4.
    """

    kind: ClassVar[str] = "block_float"

    format: BlockFormat = "mxfp4"
    tensor_scale: Float32[Tensor, "1"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in _BLOCK_SIZES:
            raise InvalidValueError(f"{self.kind}: format must be 'mxfp4' or 'nvfp4'; got {self.format!r:.60}")
        if (self.tensor_scale is None) != (self.format == "mxfp4"):
            given = "none" if self.tensor_scale is None else "one"
            raise InvalidValueError(
                f"{self.kind}: nvfp4 needs a tensor_scale and mxfp4 none; got {given} for {self.format}"
            )
        if self.tensor_scale is not None:
            check_vector(self.kind, "tensor_scale", self.tensor_scale, 1, positive=True)
            # Neither the scale of the smallest block nor the largest magnitude may vanish or overflow in float32.
            for factor in (_LEAST_BLOCK_SCALE, LARGEST_PER_TENSOR_SCALE):
                check_vector(self.kind, f"tensor_scale * {factor:g}", self.tensor_scale * factor, 1, positive=True)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        scale = self._scale_codes(largest_of_blocks(wide, self._block_size))
        codes = pack(element_codes(wide / self._scale(scale)), _BITS)
        return Codes(tensors={"codes": codes, "scale": scale}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        indices = unpack(codes.tensors["codes"], _BITS, self.channels)
        return self._scale(codes.tensors["scale"]) * look_up(_ELEMENTS.to(indices.device), indices)

    def _scale_codes(self, largest: Float32[Tensor, "tokens blocks"]) -> UInt8[Tensor, "tokens blocks"]:
        """Stored byte of each block's scale: E8M0 for MXFP4, E4M3 for NVFP4."""
        # MX: shared exponent = floor(log2 max) - 2, as 6 = 1.5 * 2^2 has exponent 2 (OCP MX v1.0, 6.3). E8M0 stores it
        # with bias 127 and keeps 255 for NaN. frexp has 1/2 <= mantissa < 1, so its exponent is floor(log2 max) + 1.
        if self.tensor_scale is None:
            return (torch.frexp(largest).exponent - 1 - 2 + 127).clamp(0, 254).to(torch.uint8)
        # NVFP4: a scale of max / 6 maps the extreme of a block to 6. It is stored in units of the tensor's scale, which
        # maps the largest block scale to 448, the end of E4M3 (arXiv 2509.25149).
        relative = largest / _LARGEST_ELEMENT / self.tensor_scale
        return to_float8(relative.clamp_min(_LEAST_BLOCK_SCALE), "e4m3")

    def _scale(self, codes: UInt8[Tensor, "tokens blocks"]) -> Float32[Tensor, "tokens channels"]:
        """Scale of each channel: the decoded scale of its block."""
        if self.tensor_scale is None:
            scale = codes.view(torch.float8_e8m0fnu).float()
        else:
            scale = self.tensor_scale * from_float8(codes, "e4m3")
        return over_channels(scale, self._block_size, self.channels)

    @property
    def _block_size(self) -> int:
        return _BLOCK_SIZES[self.format]


def element_codes(a: Float32[Tensor, "tokens channels"]) -> UInt8[Tensor, "tokens channels"]:
    """Code of the nearest E2M1 element, ties to the even code."""
    # Code as a function of magnitude m: 2 m on [0, 2] (steps of 1/2), m + 2 on [2, 4], m / 2 + 4 on [4, 6]. It is
    # concave, hence the least of the three lines, and rounding (monotone, half to even) commutes with the minimum.
    size = a.abs()
    codes = torch.minimum(torch.minimum((2 * size).round(), size.round() + 2), (size / 2).round() + 4).clamp_max(7)
    return codes.to(torch.uint8) | (torch.signbit(a).to(torch.uint8) << 3)
