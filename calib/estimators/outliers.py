"""Outlier settings of dense-and-sparse quantizers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from artifacts.quantizer import Quantizer
from artifacts.quantizers.sparse import PercentileSparse, RankSparse, ThresholdSparse
from calib.estimators.ranges import Ranges


class Outliers(BaseModel):
    """Outliers: values stored in 16 bits beside the codes.

    Parameters
    ----------
    fraction : float
        Fraction of the values, half on each side.
    rule : {'percentile', 'rank'}
        Values beyond percentiles (static per channel, or per token), or a fixed number per token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(default=0.01, gt=0, lt=0.5)
    rule: Literal["percentile", "rank"] = "percentile"

    def per_token(self, channels: int) -> int:
        """Number of outliers per token under the rule 'rank': the fraction rounded, at least one."""
        return max(1, round(self.fraction * channels))

    def wrap(self, inner: Quantizer, thresholds: Ranges | None) -> Quantizer:
        """Dense-and-sparse wrapper around `inner`; `thresholds` are static per channel, None for one pair per token."""
        channels = inner.channels
        if self.rule == "rank":
            return RankSparse(channels=channels, inner=inner, outliers_per_token=self.per_token(channels))
        if thresholds is None:
            return PercentileSparse(channels=channels, inner=inner, outlier_fraction=self.fraction)
        return ThresholdSparse(channels=channels, inner=inner, lower=thresholds.low, upper=thresholds.high)
