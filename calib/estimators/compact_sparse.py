"""Estimator of compact outliers: 8-bit residuals with an index in the head."""

from typing import Literal, final

import torch
from pydantic import Field

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.float8 import largest_float8
from artifacts.quantizers.sparse import CompactSparse, clamp_outliers
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics

_HEADROOM = 2.0
"""Ratio of the largest residual that does not saturate to the largest calibrated one."""


@final
class CompactSparseEstimator(WrappingEstimator):
    """Stores the residual of the wrapped quantizer for the outliers of each token and head.

    Parameters
    ----------
    fraction : float
        Fraction of the values of a head, rounded to a number of outliers, at least one.
    """

    method: Literal["compact_sparse"] = "compact_sparse"
    fraction: float = Field(default=0.01, gt=0, lt=0.5)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Inner fit on the reservoir with clamped outliers, and the unit of residuals from their largest error."""
        shape, rows = statistics.shape, statistics.rows
        # The mask depends on the inner quantizer's outlier score, and its fit on the mask: fit once to all values for
        # the mask, then again to the clamped values.
        first = self._around(self.inner.fit(statistics).quantizer, shape, 1.0)
        rest = clamp_outliers(rows, first.mask(rows))
        mapped = statistics.mapped(rest, statistics.row_gradients if statistics.fisher else None)
        mapped.query_energy, mapped.query_metric = statistics.query_energy, statistics.query_metric
        inner = self.fit_inner(mapped)
        largest = float((rows - inner.quantizer.simulate(rest)).abs().max())
        # Absmax scaling of the residuals, with room for larger ones than the reservoir has.
        unit = _HEADROOM * largest / largest_float8("e4m3") if largest > 0 else 1.0
        return Fit(self._around(inner.quantizer, shape, unit), inner.source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """Raises ValueError: the unit of the residuals is fitted."""
        raise InvalidValueError("the unit of the residuals is fitted; calibrate first")

    def _around(self, inner: Quantizer, shape: SiteShape, unit: float) -> CompactSparse:
        return CompactSparse(
            channels=shape.channels,
            inner=inner,
            head_dim=shape.head_dim,
            outliers_per_head=max(1, round(self.fraction * shape.head_dim)),
            value_scale=torch.full((1,), unit),
        )
