"""Uniform quantizers: x ~ offset + scale * code.

The offset takes the place of a zero point (zero_point = -offset / scale): in 16 bits an unclamped zero point of a
narrow range far from zero is wrong by whole steps, an offset never by more than its own rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from artifacts.checks import check_bits, check_vector
from artifacts.codes import Codes
from artifacts.errors import NonFiniteError
from artifacts.packing import pack, unpack
from artifacts.quantizer import Context, Quantizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Quantizer):
    """One static scale per channel: x ~ offset + scale * code, code in 0 .. 2^bits - 1.

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
        codes = uniform_codes(x.float(), self.scale, self._offset, self.bits, symmetric=self.offset is None)
        return Codes(tensors={"codes": codes}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        steps = unpack(codes.tensors["codes"], self.bits, codes.shape[1])
        if self.offset is None:  # one product, so that a step itself comes back without rounding
            return self.scale * (steps.float() - top_code(self.bits, symmetric=True) / 2)
        return self.offset + self.scale * steps

    def deviation(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Distance from the middle of the channel's range, in steps."""
        steps: Tensor = (x - self._offset) / self.scale
        return (steps - top_code(self.bits, symmetric=self.offset is None) / 2).abs()

    @property
    def _offset(self) -> Float32[Tensor, " channels"]:
        return self.offset if self.offset is not None else symmetric_offset(self.scale, self.bits)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicAffine(Quantizer):
    """A scale found from the values themselves when they are encoded, kept in float16 beside the codes.

    Parameters
    ----------
    bits : int
        Code width, 1 to 8.
    per : {'token', 'channel'}
        Reduced over the channels of one token, or over all tokens of the call for each channel. The latter looks at
        later tokens: a cache cannot do it, and reports say so.
    symmetric : bool
        Range [-m, m] with m the largest magnitude; stores no offset.
    whole_zero_point : bool
        Offset rounded to a whole number of steps within the code range, as integer kernels want it. Ranges that do
        not contain zero lose their far end.
    """

    kind: ClassVar[str] = "dynamic_affine"

    bits: int
    per: Literal["token", "channel"] = "token"
    symmetric: bool = False
    whole_zero_point: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits, least=2 if self.symmetric else 1)
        if self.per not in ("token", "channel"):
            raise ValueError(f"{self.kind}: per must be 'token' or 'channel'; got {self.per!r}")
        if self.symmetric and self.whole_zero_point:
            raise ValueError(f"{self.kind}: a symmetric range has no zero point to round")

    @property
    def tokens_per_scale(self) -> int | None:
        """1 for a scale per token, None for one over all tokens of the call."""
        return 1 if self.per == "token" else None

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        low, high = torch.aminmax(wide, dim=1 if self.per == "token" else 0, keepdim=True)
        parameters = self._parameters(low, high)
        scale, offset = self._scale_offset(parameters)
        codes = uniform_codes(wide, scale, offset, self.bits, symmetric=self.symmetric)
        return Codes(tensors={"codes": codes, **parameters}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        scale, offset = self._scale_offset(codes.tensors)
        return offset + scale * unpack(codes.tensors["codes"], self.bits, codes.shape[1])

    def _parameters(self, low: Tensor, high: Tensor) -> dict[str, Float16[Tensor, "..."]]:
        """Rounded outwards, so that the range of the stored parameters holds every value."""
        steps = 2**self.bits - 1
        if self.symmetric:
            return {"scale": self._half(torch.maximum(-low, high) / (2 ** (self.bits - 1) - 1), up=True)}
        if self.whole_zero_point:
            scale = self._half((high - low) / steps, up=True)
            zero_point = torch.round(-low / scale.float()).clamp(0, steps)
            return {"scale": scale, "offset": self._half(-zero_point * scale.float(), up=False)}
        offset = self._half(low, up=False)
        return {"scale": self._half((high - offset.float()) / steps, up=True), "offset": offset}

    def _scale_offset(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        scale = parameters["scale"].float()
        return scale, symmetric_offset(scale, self.bits) if self.symmetric else parameters["offset"].float()

    def _half(self, x: Tensor, *, up: bool) -> Float16[Tensor, "..."]:
        return round_outward(x, up=up, who=self.label, positive=up)


def round_outward(x: Tensor, *, up: bool, who: str, positive: bool = False) -> Float16[Tensor, "..."]:
    """`x` in float16, rounded up or down; at least the smallest positive number where `positive`.

    Raises
    ------
    NonFiniteError
        If `x` is beyond the range of float16.
    """
    half = x.half()
    off = half.float() < x if up else half.float() > x
    half = torch.where(off, _neighbour(half, up=up), half)
    if positive:
        half = half.clamp_min(torch.finfo(torch.float16).smallest_normal / 1024)
    if not torch.isfinite(half).all():
        raise NonFiniteError(
            f"{who}: a scale or offset of {float(x.abs().max()):.4g} does not fit float16 (largest 65504). "
            "Values this large call for a static per-channel quantizer."
        )
    return half


def _neighbour(half: Float16[Tensor, "..."], *, up: bool) -> Float16[Tensor, "..."]:
    """Next float16 above or below, by its bit pattern: `torch.nextafter` has no float16 kernel on CUDA."""
    bits = (half + 0.0).view(torch.int16).int()  # + 0.0 makes -0.0 a positive zero
    away_from_zero = (half >= 0) if up else (half <= 0)
    stepped = torch.where(away_from_zero, bits + 1, bits - 1)
    if not up:
        stepped = torch.where(half == 0, 1 - 2**15, stepped)  # the smallest negative number
    return stepped.to(torch.int16).view(torch.float16)


def uniform_codes(
    x: Float32[Tensor, "tokens channels"], scale: Tensor, offset: Tensor, bits: int, *, symmetric: bool
) -> Tensor:
    """Packed indices of the nearest step; values beyond the range saturate."""
    steps = ((x - offset) / scale).round_().clamp_(0, top_code(bits, symmetric=symmetric))
    return pack(steps.to(torch.uint8), bits)


def top_code(bits: int, *, symmetric: bool) -> int:
    """The largest code in use: a symmetric range leaves one out, to have zero in its middle."""
    codes: int = 2**bits
    return codes - 2 if symmetric else codes - 1


def symmetric_offset(scale: Tensor, bits: int) -> Tensor:
    """What code 0 stands for when the codes are centred on zero."""
    return -(top_code(bits, symmetric=True) // 2) * scale
