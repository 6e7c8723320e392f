"""Which values are kept apart, and how they are stored."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from artifacts.quantizer import Quantizer
from artifacts.quantizers.sparse import PercentileSparse, RankSparse, ThresholdSparse
from calib.estimators.ranges import Ranges


class Outliers(BaseModel):
    """Values that are kept beside the codes, in 16 bits.

    Parameters
    ----------
    fraction : float
        Share of a token's values, half on each side.
    rule : {'percentile', 'rank'}
        Beyond percentiles (static for each channel, or of each token), or exactly so many of each token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(default=0.01, gt=0, lt=0.5)
    rule: Literal["percentile", "rank"] = "percentile"

    def per_token(self, channels: int) -> int:
        """Outliers of each token under the rule 'rank': the share rounded, at least one."""
        return max(1, round(self.fraction * channels))

    def wrap(self, inner: Quantizer, thresholds: Ranges | None) -> Quantizer:
        """`inner` with its outliers kept apart; `thresholds` are static ones, None for those of each token."""
        channels = inner.channels
        if self.rule == "rank":
            return RankSparse(channels=channels, inner=inner, outliers_per_token=self.per_token(channels))
        if thresholds is None:
            return PercentileSparse(channels=channels, inner=inner, outlier_fraction=self.fraction)
        return ThresholdSparse(channels=channels, inner=inner, lower=thresholds.low, upper=thresholds.high)
