"""Non-uniform quantizers with a codebook: x ~ offset + scale * levels[code]."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float16, Float32, UInt8
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_bits, check_boundaries, check_levels, check_vector
from artifacts.coding.mixed_radix import pack_levels, unpack_levels
from artifacts.coding.rounding import round_outward
from artifacts.quantizer import RANGE_SLACK, Context, Quantizer

_FEW_LEVELS = 16
"""Most boundaries for which comparing with all is faster than a binary search (2048 x 1024 values, two cores)."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Codebook(Quantizer):
    """Codebook quantizer with a static scale and offset per channel (NUQ, arXiv 2401.18079, section 3.3).

    Parameters
    ----------
    bits : int
        Code width, 1 to 8; a table has at most 2^bits levels and more than half as many. With fewer than 2^bits, codes
        are packed in mixed radix.
    scale, offset : Float32[Tensor, "channels"]
        Half-range and midpoint of each channel, which map levels to units of x.
    levels : Float16[Tensor, "tables levels"]
        Ascending; one table for all channels, or one for each of as many equal runs of channels (heads, channels).
    boundaries : Float32[Tensor, "tables levels-1"] or None
        Decision boundaries between neighbouring levels, in units of the levels; None for the midpoints, which give the
        nearest level.
    """

    kind: ClassVar[str] = "codebook"

    bits: int
    scale: Float32[Tensor, " channels"]
    offset: Float32[Tensor, " channels"]
    levels: Float16[Tensor, "tables levels"]
    boundaries: Float32[Tensor, "tables boundaries"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits)
        check_vector(self.kind, "scale", self.scale, self.channels, positive=True)
        check_vector(self.kind, "offset", self.offset, self.channels)
        check_levels(self.kind, self.levels, self.bits, self.channels)
        check_boundaries(self.kind, self.boundaries, self.levels)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        codes = codes_of((x.float() - self.offset) / self.scale, self.levels, self.boundaries)
        return Codes(
            tensors={"codes": pack_levels(codes, self.levels.shape[1])}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype
        )

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        indices = unpack_levels(codes.tensors["codes"], self.levels.shape[1], codes.shape[1])
        return self.offset + self.scale * look_up(self.levels, indices)

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Distance from the middle of the channel's range, in half-ranges."""
        return ((x - self.offset) / self.scale).abs()

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True beyond [-1, 1], or beyond the last level by more than half its gap where levels reach further."""
        levels = self.levels.float()
        # An end level stands for its cell, which reaches as far outside as inside: half the gap to its neighbour.
        ends, gaps = levels[:, [0, -1]].abs(), levels.diff(dim=1)[:, [0, -1]]
        reach = torch.where(ends > 1, ends + gaps / 2, 1.0).amax(dim=1, keepdim=True)
        return self.outlier_score(x.float()) > RANGE_SLACK * _per_channel(reach, self.channels)[:, 0]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicCodebook(Quantizer):
    """Codebook quantizer with levels on [-1, 1] and a dynamic range per token, stored as float16 scale and offset.

    Parameters
    ----------
    bits : int
        Code width, 1 to 8; the table has at most 2^bits levels and more than half as many.
    levels : Float16[Tensor, "1 levels"]
        Ascending.
    boundaries : Float32[Tensor, "1 levels-1"] or None
        Decision boundaries between neighbouring levels; None for the midpoints, which give the nearest level.
    """

    kind: ClassVar[str] = "dynamic_codebook"

    bits: int
    levels: Float16[Tensor, "1 levels"]
    boundaries: Float32[Tensor, "1 boundaries"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.kind, self.bits)
        check_levels(self.kind, self.levels, self.bits, 1)
        check_boundaries(self.kind, self.boundaries, self.levels)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        low, high = torch.aminmax(wide, dim=1, keepdim=True)
        # a = (x - z) / s with z = (max + min) / 2 and s = (max - min) / 2 (arXiv 2401.18079, section 3.4). z is rounded
        # to float16 first; s then is the larger distance from the rounded z, so that a stays within [-1, 1].
        offset = round_outward((low + high) / 2, up=False, who=self.label)
        scale = round_outward(
            torch.maximum(high - offset.float(), offset.float() - low), up=True, who=self.label, positive=True
        )
        codes = codes_of((wide - offset.float()) / scale.float(), self.levels, self.boundaries)
        tensors = {"codes": pack_levels(codes, self.levels.shape[1]), "scale": scale, "offset": offset}
        return Codes(tensors=tensors, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        indices = unpack_levels(codes.tensors["codes"], self.levels.shape[1], codes.shape[1])
        return codes.tensors["offset"].float() + codes.tensors["scale"].float() * look_up(self.levels, indices)


def codes_of(
    a: Float32[Tensor, "tokens channels"],
    levels: Float16[Tensor, "tables levels"],
    boundaries: Float32[Tensor, "tables boundaries"] | None = None,
) -> UInt8[Tensor, "tokens channels"]:
    """Codes of values by decision boundaries; without boundaries the nearest level, ties to the lower one."""
    # Least squared error takes the nearest level, so cells meet at midpoints (Lloyd 1982). Levels are sorted, hence a
    # code is the number of boundaries below the value.
    if boundaries is None:
        wide = levels.float()
        boundaries = (wide[:, 1:] + wide[:, :-1]) / 2
    if len(boundaries) > 1:
        boundaries = _per_channel(boundaries, a.shape[1])
    # Few boundaries: one vectorised comparison per boundary beats a binary search per value.
    if boundaries.shape[1] < _FEW_LEVELS:
        codes = torch.zeros(a.shape, dtype=torch.uint8, device=a.device)
        for boundary in boundaries.unbind(dim=1):
            codes += a > boundary
        return codes
    if len(boundaries) == 1:
        return torch.bucketize(a, boundaries[0], out_int32=True).to(torch.uint8)
    return torch.searchsorted(boundaries, a.T.contiguous(), out_int32=True).T.to(torch.uint8)


def look_up(
    levels: Float16[Tensor, "tables levels"], indices: UInt8[Tensor, "tokens channels"]
) -> Float32[Tensor, "tokens channels"]:
    """Level of each code."""
    if len(levels) == 1:
        return torch.take(levels[0].float(), indices.long())
    return _per_channel(levels.float(), indices.shape[1]).T.gather(0, indices.long())


def _per_channel(tables: Tensor, channels: int) -> Tensor:
    """One row per channel from one row per table: a table serves channels / tables neighbouring channels."""
    return tables.repeat_interleave(channels // len(tables), dim=0)
