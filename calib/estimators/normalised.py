"""Estimator of normalisation by the norm of tokens or heads."""

from typing import Literal, final

import torch

from artifacts.quantizer import Quantizer
from artifacts.quantizers.normalised import Normalised
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_TINY = torch.finfo(torch.float32).tiny


@final
class NormalisedEstimator(WrappingEstimator):
    """Divides each token or head by its root mean square, stored in 16 bits.

    Parameters
    ----------
    per : {'token', 'head'}
        One norm for the whole token, or one per head.
    correct : bool
        Norm correction: store the factor that gives the decoded vector the norm of the original.
    """

    method: Literal["normalised"] = "normalised"
    per: Literal["token", "head"] = "head"
    correct: bool = False

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Normalisation with the inner fit on the normalised reservoir."""
        shape, rows = statistics.shape, statistics.rows
        groups = rows.view(len(rows), -1, self._group_size(shape) or shape.channels)
        sizes = groups.square().mean(dim=2, keepdim=True).sqrt().clamp_min(_TINY).expand_as(groups).flatten(1)
        # Chain rule with the stored size s held fixed: x = s z, so the gradient at z is s times that at x.
        mapped = statistics.mapped(rows / sizes, statistics.row_gradients * sizes if statistics.fisher else None)
        mapped.query_energy, mapped.query_metric = statistics.query_energy, statistics.query_metric
        inner = self.fit_inner(mapped)
        return Fit(self._around(inner.quantizer, shape), inner.source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Normalisation around the dynamic inner quantizer."""
        return self._around(self.inner.dynamic(shape), shape)

    def _around(self, inner: Quantizer, shape: SiteShape) -> Normalised:
        group_size = self._group_size(shape)
        return Normalised(channels=shape.channels, inner=inner, group_size=group_size, correct=self.correct)

    def _group_size(self, shape: SiteShape) -> int | None:
        return shape.head_dim if self.per == "head" else None
