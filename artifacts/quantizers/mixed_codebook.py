"""Codebook quantizer with bit allocation: a different number of levels for each channel."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float16, Float32, Int16, Int64, UInt8
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_vector
from artifacts.coding.mixed_radix import MixedRadix
from artifacts.errors import InvalidValueError
from artifacts.quantizer import RANGE_SLACK, Context, Quantizer

_MOST_LEVELS = 256
_ROUNDING = 1e-6
"""Tolerance of `bits`, a mean of logarithms whose last digits depend on the order of summation."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class MixedCodebook(Quantizer):
    """Codebook quantizer x ~ offset + scale * levels[code], with a codebook per channel and codes in mixed radix.

    Parameters
    ----------
    bits : float
        Mean over the channels of log2(number of levels).
    scale, offset : Float32[Tensor, "channels"]
        Factor and shift of each channel, which map levels to units of x.
    n_levels : Int16[Tensor, "channels"]
        Number of levels of each channel, 1 to 256. A channel with one level costs nothing per token.
    levels : Float16[Tensor, "levels"]
        All codebooks, one after the other, each in ascending order.
    """

    kind: ClassVar[str] = "mixed_codebook"

    bits: float
    scale: Float32[Tensor, " channels"]
    offset: Float32[Tensor, " channels"]
    n_levels: Int16[Tensor, " channels"]
    levels: Float16[Tensor, " levels"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vector(self.kind, "scale", self.scale, self.channels, positive=True)
        check_vector(self.kind, "offset", self.offset, self.channels)
        self._check_tables()
        if not math.isclose(self.bits, mean_bits(self.n_levels), abs_tol=_ROUNDING):
            raise InvalidValueError(
                f"{self.kind}: bits must be {mean_bits(self.n_levels)}, as n_levels says; got {self.bits}"
            )

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        a = ((x.float() - self.offset) / self.scale).T.contiguous()
        packed = self._radix.pack(self._nearest(a).T)
        return Codes(tensors={"codes": packed}, shape=(x.shape[0], x.shape[1]), dtype=x.dtype)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        digits = self._radix.unpack(codes.tensors["codes"]).T
        levels = torch.take(self.levels.float(), digits.long() + self._starts[:, None])
        return self.offset + self.scale * levels.T

    def outlier_score(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Distance from the offset, in scales."""
        return ((x - self.offset) / self.scale).abs()

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True beyond one scale from the offset."""
        return self.outlier_score(x.float()) > RANGE_SLACK

    def _nearest(self, a: Float32[Tensor, "channels tokens"]) -> UInt8[Tensor, "channels tokens"]:
        """Code of the nearest level, ties to the lower one."""
        # A code is the number of midpoints below the value. With channels sorted by table length, longest first, those
        # that have a j-th midpoint are a prefix, and each pass compares only that prefix.
        order, counts, boundaries = self._boundaries
        ordered, codes = a[order], torch.zeros_like(a, dtype=torch.uint8)
        for n, boundary in zip(counts, boundaries.unbind(dim=1), strict=True):
            codes[:n] += ordered[:n] > boundary[:n, None]
        return codes[order.argsort()]

    @functools.cached_property
    def _radix(self) -> MixedRadix:
        return MixedRadix(self.n_levels.tolist())

    @functools.cached_property
    def _starts(self) -> Int64[Tensor, " channels"]:
        """First position of each channel's codebook in `levels`."""
        return self.n_levels.long().cumsum(0) - self.n_levels

    @functools.cached_property
    def _boundaries(self) -> tuple[Tensor, list[int], Float32[Tensor, "channels boundaries"]]:
        """Channels sorted by table length (longest first), number of channels with a j-th midpoint, and midpoints."""
        # Ragged tables become one rectangle by repeating the last level of each; `counts` excludes the repeats, whose
        # midpoints would be counted as boundaries.
        lengths = self.n_levels.long()
        order = lengths.argsort(descending=True, stable=True)
        rank = torch.arange(int(lengths.max()), device=order.device)
        levels = self.levels.float()[self._starts[order, None] + rank.minimum(lengths[order, None] - 1)]
        counts = (lengths[:, None] > rank[1:]).sum(dim=0).tolist()
        return order, counts, (levels[:, 1:] + levels[:, :-1]) / 2

    def _check_tables(self) -> None:
        tables, n = self.n_levels, int(self.n_levels.sum())
        if tables.dtype != torch.int16 or tables.shape != (self.channels,):
            raise InvalidValueError(
                f"{self.kind}: n_levels must be int16 of shape ({self.channels},); "
                f"got {tables.dtype} of shape {tuple(tables.shape)}"
            )
        if (tables < 1).any() or (tables > _MOST_LEVELS).any():
            raise InvalidValueError(
                f"{self.kind}: n_levels must be from 1 to {_MOST_LEVELS}; got {tables.unique().tolist()}"
            )
        if self.levels.dtype != torch.float16 or self.levels.shape != (n,):
            raise InvalidValueError(
                f"{self.kind}: levels must be float16 of shape ({n},), as n_levels says; "
                f"got {self.levels.dtype} of shape {tuple(self.levels.shape)}"
            )
        first = torch.zeros(n, dtype=torch.bool, device=tables.device)
        first[tables.long().cumsum(0)[:-1]] = True
        wide = self.levels.float()
        if not torch.isfinite(wide).all() or ((wide.diff() < 0) & ~first[1:]).any():
            raise InvalidValueError(
                f"{self.kind}: levels must be finite and in ascending order within each table; got "
                f"{int((~torch.isfinite(wide)).sum())} of {n} not finite, "
                f"{int(((wide.diff() < 0) & ~first[1:]).sum())} below the one before"
            )


def mean_bits(n_levels: Int16[Tensor, " channels"]) -> float:
    """Mean of log2(number of levels): bits per channel before rounding up to words and bytes."""
    return float(n_levels.double().log2().mean())
