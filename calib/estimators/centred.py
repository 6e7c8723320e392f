"""Channels without their mean."""

from typing import Literal, final

from artifacts.quantizer import Quantizer
from artifacts.quantizers.centred import Centred
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_statistics import SiteShape, SiteStatistics


@final
class CentredEstimator(WrappingEstimator):
    """Subtracts each channel's mean before quantizing, and adds it afterwards.

    Parameters
    ----------
    correct : bool
        Adds the mean error as well, each token weighted by its expected squared score where keys are known: attention
        weights sum to one, so this takes the mean error out of the attention output, as far as attention falls on
        encoded tokens.
    """

    method: Literal["centred"] = "centred"
    correct: bool = False

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads the mean; what is wrapped is fitted to the centred reservoir."""
        mean = statistics.moments.mean().float().cpu()
        gradients = statistics.row_gradients if statistics.fisher else None
        mapped = statistics.mapped(statistics.rows - mean, gradients)
        mapped.query_energy, mapped.query_metric = statistics.query_energy, statistics.query_metric
        inner = self.fit_inner(mapped)
        quantizer = Centred(channels=statistics.shape.channels, inner=inner.quantizer, mean=mean)
        if self.correct:
            error = (statistics.rows - quantizer.simulate(statistics.rows)).double()
            weights = statistics.token_weights
            shift = error.mean(dim=0) if weights is None else weights.double() @ error / weights.double().sum()
            quantizer = Centred(
                channels=quantizer.channels, inner=inner.quantizer, mean=mean, restored=mean + shift.float()
            )
        return Fit(quantizer, inner.source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """There is none: means are fitted."""
        raise ValueError("the mean is fitted; calibrate first")
