"""Float8 quantizers: x ~ scale * float8(x / scale), saturating beyond the largest finite value.

Rounding is to nearest, ties to even. Precision is relative, so a scale wrong by a factor of two costs little: inference
servers use a scale of 1 where a checkpoint has none.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor
from torch.nn.functional import pad

from artifacts.codes import Codes
from artifacts.coding.checks import check_group, check_vector
from artifacts.coding.rounding import round_outward
from artifacts.errors import InvalidValueError
from artifacts.quantizer import RANGE_SLACK, Context, Quantizer

Float8Format = Literal["e4m3", "e5m2"]
_DTYPES: dict[Float8Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractFloat8(Quantizer):
    """Base of float8 quantizers: a sign, and 4 + 3 or 5 + 2 bits of exponent and mantissa (arXiv 2209.05433).

    Parameters
    ----------
    format : {'e4m3', 'e5m2'}
        Largest value 448 (no infinities), or 57344.
    """

    format: Float8Format = "e4m3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in _DTYPES:
            raise InvalidValueError(f"{self.kind}: format must be 'e4m3' or 'e5m2'; got {self.format!r:.60}")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Float8(AbstractFloat8):
    """Float8 with a static scale per channel; equal scales express one per head or per tensor.

    Parameters
    ----------
    scale : Float32[Tensor, "channels"]
        Factor from float8 to units of x; largest magnitude / largest float8 uses the whole range.
    """

    kind: ClassVar[str] = "float8"

    scale: Float32[Tensor, " channels"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vector(self.kind, "scale", self.scale, self.channels, positive=True)
        check_vector(self.kind, "scale * largest float8", self.scale * largest_float8(self.format), self.channels)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        codes = to_float8(x.float() / self.scale, self.format)
        return Codes(tensors={"codes": codes}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        return self.scale * from_float8(codes.tensors["codes"], self.format)

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Magnitude in units of the channel's scale."""
        return (x / self.scale).abs()

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True where a value saturates."""
        return self.outlier_score(x.float()) > RANGE_SLACK * largest_float8(self.format)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicFloat8(AbstractFloat8):
    """Float8 with a dynamic scale per group of channels, stored in float16 and rounded up so that nothing saturates.

    Parameters
    ----------
    group_size : int or None
        Consecutive channels of a token with one scale, such as those of a head; None for the whole token.
    """

    kind: ClassVar[str] = "dynamic_float8"

    group_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None:
            check_group(self.kind, self.group_size, self.channels)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        # Absmax scaling: max |x| / largest float8 maps the group's extreme to the last finite code.
        needed = largest_of_blocks(wide, self._group) / largest_float8(self.format)
        scale = round_outward(needed, up=True, who=self.label, positive=True)
        codes = to_float8(wide / over_channels(scale.float(), self._group, self.channels), self.format)
        return Codes(tensors={"codes": codes, "scale": scale}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        scale = over_channels(codes.tensors["scale"].float(), self._group, self.channels)
        return scale * from_float8(codes.tensors["codes"], self.format)

    @property
    def _group(self) -> int:
        return self.group_size or self.channels


def largest_float8(format: Float8Format) -> float:
    """Largest finite value of a float8 format: 448 for e4m3, 57344 for e5m2."""
    # e4m3fn has no infinity, and only mantissa 111 of the top exponent is NaN: 1.75 * 2^8. e5m2 follows IEEE: 1.75 *
    # 2^15 (arXiv 2209.05433, table 1).
    return torch.finfo(_DTYPES[format]).max


def to_float8(x: Float32[Tensor, "tokens values"], format: Float8Format) -> UInt8[Tensor, "tokens values"]:
    """Bytes of the nearest float8 values, saturating."""
    # A plain cast of e4m3fn gives NaN beyond its range, so clamp first.
    largest = largest_float8(format)
    return x.clamp(-largest, largest).to(_DTYPES[format]).view(torch.uint8)


def from_float8(codes: UInt8[Tensor, "tokens values"], format: Float8Format) -> Float32[Tensor, "tokens values"]:
    """Values of float8 bytes."""
    return codes.view(_DTYPES[format]).float()


def largest_of_blocks(x: Float32[Tensor, "tokens channels"], size: int) -> Float32[Tensor, "tokens blocks"]:
    """Largest magnitude of each `size` consecutive channels; the last block of a token may be shorter."""
    # Zeros at the end of a short last block change no maximum of magnitudes.
    blocks: Tensor = pad(x.abs(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    return blocks.amax(dim=2)


def over_channels(
    scale: Float32[Tensor, "tokens blocks"], size: int, channels: int
) -> Float32[Tensor, "tokens channels"]:
    """Scale of each channel from the scale of its block."""
    return scale.repeat_interleave(size, dim=1)[:, :channels]
