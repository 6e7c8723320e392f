"""Estimator of streaming quantization: running scales in place of calibration."""

from typing import Literal, final

from pydantic import Field, model_validator

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.streaming import Streaming
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics


@final
class StreamingEstimator(Estimator):
    """Scales from a moving average of the absmax per chunk; nothing is fitted.

    Parameters
    ----------
    bits, high_bits : int
        Code width of normal and of promoted channels, 2 to 8.
    chunk_tokens : int
        Consecutive tokens with one set of scales.
    decay : float
        Weight of the past in the running absmax.
    groups : int
        Groups of channels with one scale each; 0 for one scale per channel.
    outlier_detection : bool
        Promote outlier channels to `high_bits`.
    outlier_threshold_relative : float
        Promotes a channel for a chunk whose absmax exceeds the running one, this chunk included, by this factor.
    outlier_threshold_abs : float or None
        Promotes beyond this magnitude as well, in units of x.
    """

    method: Literal["streaming"] = "streaming"
    bits: int = Field(default=4, ge=2, le=8)
    high_bits: int = Field(default=8, ge=2, le=8)
    chunk_tokens: int = Field(default=512, ge=2)
    decay: float = Field(default=0.9, ge=0, lt=1)
    groups: int = Field(default=0, ge=0)
    outlier_detection: bool = True
    outlier_threshold_relative: float = Field(default=3.0, gt=1, allow_inf_nan=False)
    outlier_threshold_abs: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _possible(self) -> "StreamingEstimator":
        if self.high_bits < self.bits:
            raise InvalidValueError(
                f"promoted channels need at least the {self.bits} bits of the others; raise high_bits"
            )
        if not self.outlier_detection:
            if self.outlier_threshold_abs is not None:
                raise InvalidValueError(
                    "outlier_threshold_abs promotes nothing without outlier_detection; drop one of them"
                )
        elif self.outlier_threshold_abs is None and self.outlier_threshold_relative * (1 - self.decay) >= 1:
            # e' = decay * e + (1 - decay) * m >= (1 - decay) * m, so m / e' never exceeds 1 / (1 - decay).
            most = 1 / (1 - self.decay)
            raise InvalidValueError(
                f"an absmax exceeds the running one, which includes it, at most {most:.4g} times at decay "
                f"{self.decay:g}; use outlier_threshold_relative below {most:.4g}, or outlier_detection: false"
            )
        return self

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Quantizer for the shape; needs no statistics."""
        return Fit(self.dynamic(statistics.shape), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Quantizer for the shape."""
        return Streaming(
            channels=shape.channels,
            bits=self.bits,
            high_bits=self.high_bits,
            chunk_tokens=self.chunk_tokens,
            decay=self.decay,
            groups=self.groups,
            outlier_threshold_relative=self.outlier_threshold_relative if self.outlier_detection else None,
            outlier_threshold_abs=self.outlier_threshold_abs,
        )
