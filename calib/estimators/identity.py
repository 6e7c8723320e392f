"""No quantization."""

from typing import Literal, final

from artifacts.quantizer import Quantizer
from artifacts.quantizers.identity import Identity
from calib.estimators.estimator import EXACT, Estimator, Fit
from calib.statistics.site_statistics import SiteShape, SiteStatistics


@final
class IdentityEstimator(Estimator):
    """Keeps the site exact."""

    method: Literal["identity"] = "identity"

    def fit(self, statistics: SiteStatistics) -> Fit:
        """The identity; nothing is read."""
        return Fit(Identity(channels=statistics.shape.channels), EXACT)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """The identity."""
        return Identity(channels=shape.channels)
