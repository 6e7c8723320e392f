"""Outliers of each head in eight bits and an index within it."""

from typing import Literal, final

import torch
from pydantic import Field

from artifacts.quantizer import Quantizer
from artifacts.quantizers.float8 import largest_float8
from artifacts.quantizers.sparse import CompactSparse, move_to_edge
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_statistics import SiteShape, SiteStatistics

_HEADROOM = 2.0
"""Largest residual that does not saturate, over the largest that was seen."""


@final
class CompactSparseEstimator(WrappingEstimator):
    """Keeps what the wrapped quantizer misses of the furthest values of each token and head.

    Parameters
    ----------
    fraction : float
        Share of a head's values, rounded to a whole number of them, at least one.
    """

    method: Literal["compact_sparse"] = "compact_sparse"
    fraction: float = Field(default=0.01, gt=0, lt=0.5)

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Fits what is wrapped to the reservoir without its outliers, and the unit to what is then missed of them."""
        shape, rows = statistics.shape, statistics.rows
        first = self._around(self.inner.fit(statistics).quantizer, shape, 1.0)
        rest = move_to_edge(rows, first.mask(rows))
        mapped = statistics.mapped(rest, statistics.row_gradients if statistics.fisher else None)
        mapped.query_energy, mapped.query_metric = statistics.query_energy, statistics.query_metric
        inner = self.fit_inner(mapped)
        largest = float((rows - inner.quantizer.simulate(rest)).abs().max())
        unit = _HEADROOM * largest / largest_float8("e4m3") if largest > 0 else 1.0
        return Fit(self._around(inner.quantizer, shape, unit), inner.source)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """There is none: the unit of the residuals is fitted."""
        raise ValueError("the unit of the residuals is fitted; calibrate first")

    def _around(self, inner: Quantizer, shape: SiteShape, unit: float) -> CompactSparse:
        return CompactSparse(
            channels=shape.channels,
            inner=inner,
            head_dim=shape.head_dim,
            outliers_per_head=max(1, round(self.fraction * shape.head_dim)),
            value_scale=torch.full((1,), unit),
        )
