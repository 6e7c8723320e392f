"""What earlier sites say about a token, and only the rest of it quantized."""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal, final

import torch
from jaxtyping import Float16, Float32, Float64
from pydantic import Field
from torch import Tensor

from artifacts.quantizer import Quantizer
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.predicted import Predicted
from artifacts.sites import Site
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.solvers.predictor import fit_predictor, held_out_shrinkage
from calib.statistics.site_statistics import SiteShape, SiteStatistics
from calib.statistics.sources import Sources

_LARGEST = torch.finfo(torch.float16).max
_TINY = torch.finfo(torch.float64).tiny
_FLOOR = 1e-6
"""Of the mean weight: what no query reads is still predicted somehow."""


@final
class PredictedEstimator(WrappingEstimator):
    """Predicts each token linearly from the decoded vectors of earlier sites; what is left is quantized.

    A site without sources, such as the keys of the first layer, is quantized as it is.

    Parameters
    ----------
    from_sites : {'before', 'beside', 'both'}
        Keys and values of the layer before; the key beside a value; or both.
    rank_fraction : float or None
        Rank of the predictor, in units of the channels; None for all of it.

    References
    ----------
    arXiv 2501.19392, section 3.
    """

    method: Literal["predicted"] = "predicted"
    from_sites: Literal["before", "beside", "both"] = "both"
    rank_fraction: float | None = Field(default=None, gt=0, le=1)

    @property
    def needs_full(self) -> bool:
        """Moments between sites are those of the tier `full`."""
        return True

    def sources(self, site: Site, sites: Collection[Site]) -> tuple[Site, ...]:
        """Those of `sites` that a site is predicted from."""
        found = []
        if self.from_sites != "beside":
            found += [other for other in sites if other.layer == site.layer - 1]
        if self.from_sites != "before":
            found += [other for other in sites if other.layer == site.layer and other < site]
        return tuple(sorted(found))

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Reads moments between sites and the reservoir; what is wrapped is fitted to the rest of the reservoir."""
        sources = statistics.sources
        if sources is None:
            found: Fit = self.inner.fit(statistics)
            return found
        rows = statistics.rows
        shrinkage = sources.shrinkage or held_out_shrinkage(sources, rows, _weights(statistics))
        quantizer, predictions = self._predictor(sources, statistics, fit_predictor(sources, rows, shrinkage))
        rest = rows - predictions
        mapped = statistics.mapped(rest, statistics.row_gradients if statistics.fisher else None)
        mapped.query_energy, mapped.query_metric = statistics.query_energy, statistics.query_metric
        inner = self.fit_inner(mapped)
        decoded = predictions + inner.quantizer.simulate(rest)
        whole = quantizer.wrapping(inner.quantizer)
        return replace(inner, quantizer=whole, decoded=decoded, shrinkage=shrinkage)

    def dynamic(self, shape: SiteShape) -> Quantizer:
        """There is none: predictors are fitted."""
        raise ValueError("a predictor is fitted; calibrate first")

    def _predictor(
        self, sources: Sources, statistics: SiteStatistics, weight: Float64[Tensor, "inputs channels"]
    ) -> tuple[Predicted, Float32[Tensor, "rows channels"]]:
        """Around no quantizer yet, and what it predicts; its bias is the mean of what the rounded weights leave."""
        rows, channels = statistics.rows, statistics.shape.channels
        expansion, rank = None, max(1, round((self.rank_fraction or 1) * channels))
        if rank * sum(weight.shape) < weight.numel():  # else factors would be no smaller
            weight, expansion = _factors(weight, sources, _weights(statistics), rank)
        predicted = Predicted(
            channels=channels,
            inner=Identity(channels=channels),
            source_sites=" ".join(map(str, sources.sites)),
            weight=_half(weight),
            bias=torch.zeros(channels),
            expansion=None if expansion is None else _half(expansion),
        )
        unbiased = predicted.predict(sources.context)
        bias = (rows - unbiased).mean(dim=0)
        return replace(predicted, bias=bias), bias + unbiased


def _weights(statistics: SiteStatistics) -> Float64[Tensor, " channels"]:
    """Of a squared error in each channel: what queries read of it."""
    energy = statistics.query_energy
    return torch.ones(statistics.shape.channels, dtype=torch.float64) if energy is None else energy


def _factors(
    weight: Float64[Tensor, "inputs channels"], sources: Sources, weights: Float64[Tensor, " channels"], rank: int
) -> tuple[Float64[Tensor, "inputs rank"], Float64[Tensor, "rank channels"]]:
    """The predictor of a lower rank whose predictions differ least: A V and V^T, V the main axes of the predictions."""
    root = (weights / weights.mean().clamp_min(_TINY)).clamp_min(_FLOOR).sqrt()
    covariance = torch.cov(sources.decoded.double().mT, correction=0)
    predictions = (root[:, None] * (weight.mT @ covariance @ weight)) * root
    axes = torch.linalg.eigh(predictions).eigenvectors[:, -rank:].flip(1)
    return weight @ (root[:, None] * axes), axes.mT / root


def _half(matrix: Float64[Tensor, "rows columns"]) -> Float16[Tensor, "rows columns"]:
    return matrix.clamp(-_LARGEST, _LARGEST).half()
