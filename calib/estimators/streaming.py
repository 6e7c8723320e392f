"""Running statistics in place of calibration."""

from typing import Literal, final

from pydantic import Field, model_validator

from artifacts.quantizer import Quantizer
from artifacts.quantizers.streaming import Streaming
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.statistics.site_statistics import SiteShape, SiteStatistics


@final
class StreamingEstimator(Estimator):
    """Scales that follow a running maximum from chunk to chunk; nothing is fitted.

    Parameters
    ----------
    bits, high_bits : int
        Code width of ordinary and of promoted channels, 2 to 8.
    chunk_tokens : int
        Consecutive tokens that share scales.
    decay : float
        Weight of the past in the running maximum.
    groups : int
        Groups of channels that share a scale; 0 for every channel its own.
    outlier_detection : bool
        Whether channels are promoted at all.
    outlier_threshold_relative : float
        Promotes a channel in a chunk whose maximum exceeds the running one, the chunk included, this many times.
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
            raise ValueError(f"promoted channels need at least the {self.bits} bits of the others; raise high_bits")
        if not self.outlier_detection:
            if self.outlier_threshold_abs is not None:
                raise ValueError("outlier_threshold_abs promotes nothing without outlier_detection; drop one of them")
        elif self.outlier_threshold_abs is None and self.outlier_threshold_relative * (1 - self.decay) >= 1:
            most = 1 / (1 - self.decay)
            raise ValueError(
                f"no maximum exceeds the running one, which it is part of, {most:.4g} times at decay {self.decay:g}; "
                f"use outlier_threshold_relative below {most:.4g}, or outlier_detection: false"
            )
        return self

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads nothing but the shape."""
        return Fit(self.dynamic(statistics.shape), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """The quantizer, whatever was or was not calibrated."""
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
