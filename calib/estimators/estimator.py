"""The contract of every estimator.

A final subclass is a frozen pydantic model: its fields are hyper-parameters that a recipe names, nothing fitted is kept
in it, and `fit` is a pure function of the statistics.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from artifacts.quantizer import Quantizer
from artifacts.sparse import PercentileSparse, RankSparse, ThresholdSparse
from calib.estimators.ranges import Ranges
from calib.statistics.site_statistics import SiteStatistics

EXACT = "exact statistics"


@dataclass(frozen=True)
class Fit:
    """A quantizer, and what it was read from: exact statistics, or an approximation and which."""

    quantizer: Quantizer
    source: str


class Outliers(BaseModel):
    """Values that are kept in 16 bits beside the codes.

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


class Estimator(BaseModel, ABC):
    """Hyper-parameters of a quantizer, and the way from statistics to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics that the fit reads, by their names in `SiteStatistics`."""

    @abstractmethod
    def fit(self, statistics: SiteStatistics) -> Fit:
        """The quantizer for a site."""

    @abstractmethod
    def dynamic(self, channels: int) -> Quantizer:
        """The quantizer that finds every parameter when it encodes, where there is one.

        Raises
        ------
        ValueError
            If the method cannot do without calibration.
        """
