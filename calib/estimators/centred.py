"""Estimator of mean subtraction per channel."""

from typing import Literal, final

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.centred import Centred
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics


@final
class CentredEstimator(WrappingEstimator):
    """Subtracts the mean of each channel before quantization and adds it back afterwards.

    Parameters
    ----------
    correct : bool
        Bias correction: adds the mean error too, tokens of values weighted by their expected squared score. Attention
        weights sum to one, so this removes the mean error from the attention output, as far as attention falls on
        encoded tokens.
    """

    method: Literal["centred"] = "centred"
    correct: bool = False

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Centring by the exact mean, with the inner fit on the centred reservoir."""
        mean = statistics.moments.mean().float().cpu()
        gradients = statistics.row_gradients if statistics.fisher else None
        mapped = statistics.mapped(statistics.rows - mean, gradients)
        mapped.query_energy, mapped.query_metric = statistics.query_energy, statistics.query_metric
        inner = self.fit_inner(mapped)
        quantizer = Centred(channels=statistics.shape.channels, inner=inner.quantizer, mean=mean)
        if self.correct:  # restored = mean + E[x - x'], see `Centred`
            error = (statistics.rows - quantizer.simulate(statistics.rows)).double()
            weights = statistics.token_weights
            shift = error.mean(dim=0) if weights is None else weights.double() @ error / weights.double().sum()
            quantizer = Centred(
                channels=quantizer.channels, inner=inner.quantizer, mean=mean, restored=mean + shift.float()
            )
        return Fit(quantizer, inner.source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Raises ValueError: means are fitted."""
        raise InvalidValueError("the mean is fitted; calibrate first")
