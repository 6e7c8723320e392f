"""Uniform grids."""

from typing import ClassVar, Literal, final

import torch
from pydantic import Field, model_validator

from artifacts.affine import Affine, DynamicAffine
from artifacts.quantizer import Quantizer
from calib.estimators.estimator import EXACT, Estimator, Fit, Outliers
from calib.estimators.ranges import Ranges, ThresholdDtype, channel_ranges, constant_step
from calib.statistics.site_statistics import SiteStatistics

_TINY = torch.finfo(torch.float32).tiny


@final
class UniformEstimator(Estimator):
    """Equal steps between the ends of a range.

    Parameters
    ----------
    bits : int
        Code width, 1 to 8.
    per : {'channel', 'token'}
        One static range per channel, or each token's own range.
    symmetric : bool
        Range centred on zero.
    whole_zero_point : bool
        Zero point rounded to an integer within the code range.
    outliers : Outliers or None
        Values kept apart.
    threshold_dtype : {'float32', 'float16'}
        Precision of the static range's ends.
    """

    needs: ClassVar[tuple[str, ...]] = ("tails", "histogram")

    method: Literal["uniform"] = "uniform"
    bits: int = Field(default=4, ge=1, le=8)
    per: Literal["channel", "token"] = "channel"
    symmetric: bool = False
    whole_zero_point: bool = False
    outliers: Outliers | None = None
    threshold_dtype: ThresholdDtype = "float32"

    @model_validator(mode="after")
    def _possible(self) -> "UniformEstimator":
        if self.symmetric and self.whole_zero_point:
            raise ValueError("a symmetric range has no zero point to round; drop symmetric or whole_zero_point")
        if self.symmetric and self.bits == 1:
            raise ValueError("one bit leaves a symmetric grid with the level 0 alone; use at least 2 bits")
        return self

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads the ranges of the channels; a per-token grid needs nothing."""
        channels = statistics.shape.channels
        if self.per == "token":
            return Fit(self.dynamic(channels), EXACT)
        fraction = self.outliers.fraction if self.outliers else 0.0
        ranges = channel_ranges(statistics, fraction, self.threshold_dtype)
        inner = self._grid(ranges)
        return Fit(self.outliers.wrap(inner, ranges) if self.outliers else inner, ranges.source)

    def dynamic(self, channels: int) -> Quantizer:
        """Ranges of the values that are encoded: of each token, or of each channel over the whole call."""
        inner = DynamicAffine(
            channels=channels,
            bits=self.bits,
            per=self.per,
            symmetric=self.symmetric,
            whole_zero_point=self.whole_zero_point,
        )
        return self.outliers.wrap(inner, None) if self.outliers else inner

    def _grid(self, ranges: Ranges) -> Affine:
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
