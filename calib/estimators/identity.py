"""Estimator of the identity: no quantization."""

from typing import Literal, final

from artifacts.quantizer import Quantizer
from artifacts.quantizers.identity import Identity
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics


@final
class IdentityEstimator(Estimator):
    """Keeps the site in full precision."""

    method: Literal["identity"] = "identity"

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Identity; needs no statistics."""
        return Fit(Identity(channels=statistics.shape.channels), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Identity."""
        return Identity(channels=shape.channels)
