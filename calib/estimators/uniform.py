"""Estimator of uniform quantization, static or dynamic."""

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float32
from pydantic import Field, model_validator
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.affine import Affine
from artifacts.quantizers.dynamic_affine import DynamicAffine
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.estimators.outliers import Outliers
from calib.estimators.ranges import Ranges, ThresholdDtype, channel_ranges, constant_step
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

RATIOS = torch.linspace(1.0, 0.3, 36)
"""Clip ratios of the grid search: from 1 to 0.3 in steps of 2 %."""

_TINY = torch.finfo(torch.float32).tiny


def best_ratios(
    quantizer: Callable[[Float32[Tensor, " channels"]], Quantizer],
    rows: Float32[Tensor, "rows channels"],
    weights: Float32[Tensor, "rows channels"],
    width: int,
) -> Float32[Tensor, " channels"]:
    """Clip ratio of every channel with the least weighted squared error over `rows`; ties go to the larger ratio.

    Parameters
    ----------
    quantizer : callable
        Quantizer with ranges clipped by a ratio per channel.
    rows : Float32[Tensor, "rows channels"]
        Tokens to quantize.
    weights : Float32[Tensor, "rows channels"]
        Weights of their squared errors.
    width : int
        Neighbouring channels with one ratio; divides the channels.
    """
    errors = []
    # Clipping trades saturation of the tails for finer steps; the best ratio has no closed form and is searched on a
    # grid, as in SKVQ (arXiv 2405.06219), here by the error of keys and values themselves.
    for ratio in RATIOS:
        decoded = quantizer(ratio.expand(rows.shape[1])).simulate(rows)
        errors.append((weights * (decoded - rows).square()).sum(dim=0, dtype=torch.float64))
    by_width = torch.stack(errors).unflatten(1, (-1, width)).sum(dim=2)
    return RATIOS[by_width.argmin(dim=0)].repeat_interleave(width)


@final
class UniformEstimator(Estimator):
    """Uniform quantization with equal steps between the ends of a range.

    Parameters
    ----------
    bits : int
        Code width, 1 to 8.
    per : {'tensor', 'head', 'channel', 'token'}
        Granularity of the scales. All but `token` are static by default; a dynamic scale per head is one per token and
        head.
    group_size : int or None
        Channels of a token, or consecutive tokens of a channel, with one scale; always dynamic.
    static : bool or None
        Scales from calibration (True) or from the values that are encoded (False); None for the default of `per`.
    symmetric : bool
        Range centred on zero.
    whole_zero_point : bool
        Round the zero point to an integer inside the code range.
    range : {'minmax', 'percentile', 'mse', 'attention'}
        Ends of a range: minimum and maximum; percentiles that exclude `clip_fraction` (static only); or the clip ratio
        with the least squared error over the token reservoir, unweighted or weighted by its first-order effect on
        attention: the energy of the queries for keys (arXiv 2605.17757), the expected squared logit of the token's key
        for values.
    clip_fraction : float
        Fraction of values outside the percentiles, half on each side.
    clip_ratio : float
        Fraction of a dynamic range that is kept.
    outliers : Outliers or None
        Outliers stored in 16 bits.
    threshold_dtype : {'float32', 'float16'}
        Precision of the ends of static ranges.
    """

    method: Literal["uniform"] = "uniform"
    bits: int = Field(default=4, ge=1, le=8)
    per: Literal["tensor", "head", "channel", "token"] = "channel"
    group_size: int | None = Field(default=None, ge=1)
    static: bool | None = None
    symmetric: bool = False
    whole_zero_point: bool = False
    range: Literal["minmax", "percentile", "mse", "attention"] = "minmax"
    clip_fraction: float = Field(default=0.001, gt=0, lt=0.5)
    clip_ratio: float = Field(default=1.0, gt=0, le=1)
    outliers: Outliers | None = None
    threshold_dtype: ThresholdDtype = "float32"

    @model_validator(mode="after")
    def _possible(self) -> "UniformEstimator":
        if self.symmetric and self.whole_zero_point:
            raise InvalidValueError("a symmetric range has no zero point to round; drop symmetric or whole_zero_point")
        if self.symmetric and self.bits == 1:
            raise InvalidValueError("one bit leaves a symmetric grid with the level 0 alone; use at least 2 bits")
        if self.group_size and self.per in ("tensor", "head"):
            raise InvalidValueError(
                f"per: {self.per} has no groups; use per: token (of channels) or per: channel (of tokens)"
            )
        if self.static and (self.per == "token" or self.group_size):
            raise InvalidValueError(
                "scales of tokens or groups cannot be static; drop static: true, or use per: channel without group_size"
            )
        if self._is_dynamic and self.range == "percentile":
            raise InvalidValueError("percentiles need static ranges; for a dynamic one use clip_ratio, or range: mse")
        if not self._is_dynamic and self.clip_ratio != 1:
            raise InvalidValueError("clip_ratio needs dynamic ranges; for a static one use range: percentile or mse")
        return self

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Static scales from channel ranges; a dynamic quantizer needs at most a clip ratio."""
        if self._is_dynamic:
            return self._fit_dynamic(statistics)
        fraction = self.outliers.fraction if self.outliers else 0.0
        outer = channel_ranges(statistics, fraction, self.threshold_dtype)
        clipped = outer if self.range != "percentile" else self._percentiles(statistics, fraction)
        ranges, source = clipped.union(self._width(statistics.shape)), clipped.source
        if self.range in ("mse", "attention"):
            # Outliers are stored apart and do not enter the error: clamp them, as the wrapper does before encoding.
            rows = torch.minimum(torch.maximum(statistics.rows, outer.low), outer.high)
            weights = self._weights(statistics)
            width = self._width(statistics.shape)
            ranges = ranges.shrunk(best_ratios(lambda r: self._grid(ranges.shrunk(r)), rows, weights, width))
            source = f"{source}; reservoir of {len(rows)} tokens"
        inner = self._grid(ranges)
        return Fit(self.outliers.wrap(inner, outer) if self.outliers else inner, source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Dynamic ranges of each token or group, or of each channel over the whole call."""
        return self._wrapped(self._dynamic(shape, self.clip_ratio))

    @property
    def _is_dynamic(self) -> bool:
        return self.per == "token" or self.group_size is not None or self.static is False

    def _fit_dynamic(self, statistics: SiteStatistics) -> Fit:
        if self.range == "minmax":
            return Fit(self.dynamic(statistics.shape), EXACT)
        rows, shape = statistics.rows, statistics.shape
        # A dynamic quantizer stores no range: one ratio, rounded to its two decimals, serves all tokens and channels.
        ratios = best_ratios(
            lambda r: self._wrapped(self._dynamic(shape, round(float(r[0]), 2))),
            rows,
            self._weights(statistics),
            shape.channels,
        )
        inner = self._dynamic(shape, round(float(ratios[0]), 2))
        return Fit(self._wrapped(inner), f"reservoir of {len(rows)} tokens")

    def _dynamic(self, shape: SiteShape, clip_ratio: float) -> DynamicAffine:
        by_head = self.per == "head"
        return DynamicAffine(
            channels=shape.channels,
            bits=self.bits,
            per="token" if self.per in ("token", "head") else "channel" if self.per == "channel" else "tensor",
            group_size=shape.head_dim if by_head else self.group_size,
            symmetric=self.symmetric,
            whole_zero_point=self.whole_zero_point,
            clip_ratio=clip_ratio if clip_ratio < 1 else None,
        )

    def _wrapped(self, inner: Quantizer) -> Quantizer:
        return self.outliers.wrap(inner, None) if self.outliers else inner

    def _width(self, shape: SiteShape) -> int:
        """Number of neighbouring channels with one static scale."""
        return {"tensor": shape.channels, "head": shape.head_dim}.get(self.per, 1)

    def _percentiles(self, statistics: SiteStatistics, outlier_fraction: float) -> Ranges:
        return channel_ranges(statistics, outlier_fraction + self.clip_fraction, self.threshold_dtype)

    def _weights(self, statistics: SiteStatistics) -> Float32[Tensor, "rows channels"]:
        # First-order effect on attention: E[q^2] per key channel, expected squared logit per value token.
        weights = torch.ones_like(statistics.rows)
        if self.range == "attention" and statistics.query_energy is not None:
            weights = weights * statistics.query_energy.float()
        if self.range == "attention" and statistics.token_weights is not None:
            weights = weights * statistics.token_weights[:, None]
        return weights

    def _grid(self, ranges: Ranges) -> Affine:
        # x = offset + scale * code with scale = (high - low) / (2^bits - 1); symmetric: scale = absmax / (2^(bits-1) -
        # 1). Constants get a step of which they are a multiple, so that they are reproduced exactly.
        low, high, steps = ranges.low, ranges.high, 2**self.bits - 1
        channels = len(low)
        if self.symmetric:
            scale = torch.maximum(low.abs(), high.abs()) / (2 ** (self.bits - 1) - 1)
            scale = torch.where(ranges.constant, torch.where(low == 0, 1.0, low.abs()), scale)
            return Affine(channels=channels, bits=self.bits, scale=scale.clamp_min(_TINY))
        scale = torch.where(ranges.constant, constant_step(low), (high - low) / steps).clamp_min(_TINY)
        offset = -scale * torch.round(-low / scale).clamp(0, steps) if self.whole_zero_point else low
        middle = low - scale * 2 ** (self.bits - 1)
        return Affine(
            channels=channels, bits=self.bits, scale=scale, offset=torch.where(ranges.constant, middle, offset)
        )
