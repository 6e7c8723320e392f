"""Dense-and-sparse quantizers: outliers of each token in 16 bits, all other values in the wrapped quantizer.

An outlier costs its value, its channel index (one or two bytes) and, where their number varies, part of a count per
token. The wrapped quantizer encodes the token with outliers clamped to the range of the rest, which they do not widen.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from torch import Tensor

from artifacts.codes import Codes
from artifacts.coding.checks import check_vector
from artifacts.coding.finite import expect_finite
from artifacts.coding.packing import pack, unpack
from artifacts.coding.span import Span
from artifacts.errors import InvalidValueError, NonFiniteError
from artifacts.quantizer import Context
from artifacts.quantizers.float8 import from_float8, to_float8
from artifacts.quantizers.wrapper import AbstractWrapper


@dataclass(frozen=True, kw_only=True, eq=False)
class AbstractSparse(AbstractWrapper):
    """Base of dense-and-sparse quantizers: stores the values in `mask` beside the codes of `inner`."""

    @abstractmethod
    def mask(self, x: Float32[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True where a value is an outlier, stored in 16 bits."""

    @final
    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        mask = self.mask(wide)
        rows, channels = mask.nonzero(as_tuple=True)
        tensors = {
            **self._store_counts(rows, x.shape[0]),
            "indices": channels.to(_index_dtype(self.channels - 1)),
            "values": self._stored_values(x[rows, channels]),
        }
        # Clamped, not zeroed: a zero could widen the range of a token whose other values are far from zero.
        dense = self.inner._encode(clamp_outliers(wide, mask), context)
        spans = dict.fromkeys(("indices", "values"), self._span)
        return Codes(tensors=tensors, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, spans=spans, inner=dense)

    @final
    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        x = self.inner._decode(codes.inner, context).clone()
        indices = codes.tensors["indices"].long()
        # Entries are sorted by token, so the counts tell the row of each, as in the row pointers of CSR.
        rows = torch.arange(codes.shape[0], device=x.device).repeat_interleave(self._counts(codes))
        x[rows, indices] = codes.tensors["values"].to(x.dtype)
        return x

    @property
    def _span(self) -> Span:
        """Span of the outlier tensors: as many entries per token as `counts` says."""
        return Span(entries="counts")

    def _store_counts(self, rows: Int64[Tensor, " outliers"], n_tokens: int) -> dict[str, Tensor]:
        return {"counts": torch.bincount(rows, minlength=n_tokens).to(_index_dtype(self.channels))}

    def _counts(self, codes: Codes) -> Int64[Tensor, " tokens"]:
        return codes.tensors["counts"].long()

    def _stored_values(self, values: Float[Tensor, " outliers"]) -> Float[Tensor, " outliers"]:
        # A bfloat16 model keeps its own 16 bits, whose range float16 does not have; float32 is rounded to float16.
        stored = values if values.element_size() == 2 else values.half()
        expect_finite(
            stored,
            values,
            lambda _, largest: NonFiniteError(
                f"{self.label}: an outlier of {largest:.4g} does not fit float16 (largest 65504). "
                "Run the model with --dtype bfloat16, or use a recipe without outliers."
            ),
        )
        return stored


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdSparse(AbstractSparse):
    """Outliers by static thresholds, a pair per channel (arXiv 2401.18079, section 3.4, for keys).

    Parameters
    ----------
    lower, upper : Float32[Tensor, "channels"]
        Values strictly below `lower` or above `upper` are outliers, in units of x.
    """

    kind: ClassVar[str] = "threshold_sparse"

    lower: Float32[Tensor, " channels"]
    upper: Float32[Tensor, " channels"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vector(self.kind, "lower", self.lower, self.channels)
        check_vector(self.kind, "upper", self.upper, self.channels)
        if (self.lower > self.upper).any():
            n_bad = int((self.lower > self.upper).sum())
            raise InvalidValueError(f"{self.kind}: lower must not exceed upper; got {n_bad} of {self.channels} that do")

    def mask(self, x: Float32[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True beyond the thresholds of the channel."""
        return (x < self.lower) | (x > self.upper)

    def outside(self, x: Float[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True beyond the thresholds, or beyond the range of the wrapped quantizer."""
        kept, clipped = self.mask(x.float()), self.inner.outside(x)
        return kept if clipped is None else kept | clipped


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PercentileSparse(AbstractSparse):
    """Outliers by percentiles over the channels of each token (arXiv 2401.18079, section 3.4, for values).

    Parameters
    ----------
    outlier_fraction : float
        Fraction of a token's values beyond its two percentiles, half on each side. The percentiles are interpolated
        and count as outliers themselves, as in the published code, so that a few more values are outliers.
    """

    kind: ClassVar[str] = "percentile_sparse"

    outlier_fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outlier_fraction < 0.5:
            raise InvalidValueError(f"{self.kind}: outlier_fraction must be in (0, 0.5); got {self.outlier_fraction!r}")

    def mask(self, x: Float32[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True at and beyond the percentiles of the token."""
        upper = upper_quantile(x, self.outlier_fraction / 2)
        lower = -upper_quantile(-x, self.outlier_fraction / 2)
        return (x <= lower) | (x >= upper)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RankSparse(AbstractSparse):
    """Fixed number of outliers per token: the largest outlier scores; ties go to the lower channels.

    Parameters
    ----------
    outliers_per_token : int
        From 1 to channels - 1.
    """

    kind: ClassVar[str] = "rank_sparse"

    outliers_per_token: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outliers_per_token < self.channels:
            raise InvalidValueError(
                f"{self.kind}: outliers_per_token must be from 1 to {self.channels - 1}; got {self.outliers_per_token}"
            )

    def mask(self, x: Float32[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True at the largest outlier scores of the wrapped quantizer."""
        return largest_scores(self.inner.outlier_score(x), self.outliers_per_token)

    @property
    def _span(self) -> Span:
        return Span(entries=self.outliers_per_token)

    def _store_counts(self, rows: Int64[Tensor, " outliers"], n_tokens: int) -> dict[str, Tensor]:
        return {}

    def _counts(self, codes: Codes) -> Int64[Tensor, " tokens"]:
        return torch.full((codes.shape[0],), self.outliers_per_token, device=codes.tensors["indices"].device)


def largest_scores(score: Float[Tensor, "*rows values"], count: int) -> Bool[Tensor, "*rows values"]:
    """True at the `count` largest values of each row; ties go to the first."""
    # topk breaks ties as the device likes: take all above the count-th value, then ties in order until count is full.
    least = score.topk(count, dim=-1).values[..., -1:]
    beyond, level = score > least, score == least
    missing = count - beyond.sum(dim=-1, keepdim=True)
    return beyond | (level & (level.cumsum(dim=-1) <= missing))


def upper_quantile(x: Float32[Tensor, "tokens channels"], tail: float) -> Float32[Tensor, "tokens 1"]:
    """Quantile 1 - tail of each token, linearly interpolated as `numpy.quantile` does."""
    # In descending order the quantile 1 - t of n values stands at position t (n - 1), between the order statistics
    # floor and floor + 1 (Hyndman and Fan 1996, type 7): topk of two more than floor is enough.
    position = tail * (x.shape[1] - 1)
    below = int(position)
    top = x.topk(min(below + 2, x.shape[1]), dim=1).values
    return torch.lerp(top[:, below : below + 1], top[:, -1:], position - below)


def clamp_outliers(
    x: Float32[Tensor, "*rows values"], mask: Bool[Tensor, "*rows values"]
) -> Float32[Tensor, "*rows values"]:
    """Rows with masked values clamped to the range of the unmasked ones; zeros where all are masked."""
    # min(max(x, low), high) with the range of the unmasked values leaves these as they are.
    low = x.masked_fill(mask, torch.inf).amin(dim=-1, keepdim=True)
    high = x.masked_fill(mask, -torch.inf).amax(dim=-1, keepdim=True)
    moved = torch.minimum(torch.maximum(x, low), high)
    return torch.where(torch.isfinite(moved), moved, 0.0)


def _index_dtype(largest: int) -> torch.dtype:
    return torch.uint8 if largest < 256 else torch.int16


# Bits: in the classes above an outlier costs 16 for its value and 8 or 16 for its channel index. Below, at head_dim
# 128, it costs 8 + 7, without a count: two outliers a head (1.5625 %) are 2 * 15 / 128 = 0.23 bits a value.
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CompactSparse(AbstractWrapper):
    """Float8 residuals for the `outliers_per_head` values of each token and head with the largest outlier scores.

    The wrapped quantizer encodes each head with outliers clamped to the range of the rest; their remaining error is
    stored as e4m3, whose 3-bit mantissa has a relative error of at most 1/16: adding it never increases the error.

    Parameters
    ----------
    head_dim : int
        Channels of a head, 2 to 256; a divisor of the channels.
    outliers_per_head : int
        From 1 to head_dim - 1; ties go to the lower channels.
    value_scale : Float32[Tensor, "1"]
        Unit of the residuals, in units of x. They saturate at 448 times it and vanish below 2^-10 times it.
    """

    kind: ClassVar[str] = "compact_sparse"

    head_dim: int
    outliers_per_head: int
    value_scale: Float32[Tensor, "1"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.head_dim <= 256 or self.channels % self.head_dim:
            raise InvalidValueError(
                f"{self.kind}: head_dim must be from 2 to 256 and divide {self.channels} channels; got {self.head_dim}"
            )
        if not 0 < self.outliers_per_head < self.head_dim:
            raise InvalidValueError(
                f"{self.kind}: outliers_per_head must be from 1 to {self.head_dim - 1}; got {self.outliers_per_head}"
            )
        check_vector(self.kind, "value_scale", self.value_scale, 1, positive=True)

    def mask(self, x: Float32[Tensor, "tokens channels"]) -> Bool[Tensor, "tokens channels"]:
        """True at the largest outlier scores of each head, by the wrapped quantizer."""
        return largest_scores(self._heads(self.inner.outlier_score(x)), self.outliers_per_head).flatten(1)

    def _encode(self, x: Float[Tensor, "tokens channels"], context: Context) -> Codes:
        wide = x.float()
        mask = self.mask(wide)
        # A fixed number per head makes indices rectangular, in ascending order: no counts, and an index within the head
        # instead of one over all channels.
        channels = mask.nonzero(as_tuple=True)[1].view(len(x), self._outliers)
        dense = self.inner._encode(clamp_outliers(self._heads(wide), self._heads(mask)).flatten(1), context)
        # The residual, not the value: it is smaller, and its float8 error shrinks with it.
        missed = (wide - self.inner._decode(dense, context)).gather(1, channels)
        tensors = {
            "indices": pack(channels % self.head_dim, self._index_bits),
            "values": to_float8(missed / self.value_scale, "e4m3"),
        }
        return Codes(tensors=tensors, shape=(x.shape[0], x.shape[1]), dtype=x.dtype, inner=dense)

    def _decode(self, codes: Codes, context: Context) -> Float[Tensor, "tokens channels"]:
        assert codes.inner is not None
        x = self.inner._decode(codes.inner, context)
        missed = from_float8(codes.tensors["values"], "e4m3") * self.value_scale
        return x.scatter_add(1, self._channels(codes.tensors["indices"]), missed)

    def _heads(self, x: Tensor) -> Shaped[Tensor, "tokens heads head_dim"]:
        heads: Tensor = x.unflatten(1, (-1, self.head_dim))
        return heads

    @property
    def _outliers(self) -> int:
        return self.channels // self.head_dim * self.outliers_per_head

    @property
    def _index_bits(self) -> int:
        return (self.head_dim - 1).bit_length()

    def _channels(self, indices: UInt8[Tensor, "tokens bytes"]) -> Int64[Tensor, "tokens outliers"]:
        in_head = unpack(indices, self._index_bits, self._outliers).long()
        heads = torch.arange(self._outliers, device=indices.device) // self.outliers_per_head
        return in_head + heads * self.head_dim
