"""Estimator of linear prediction from earlier sites, with quantization of the residual."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, final

import torch
from jaxtyping import Float, Float16, Float32, Float64
from pydantic import Field
from torch import Tensor

from artifacts.errors import InvalidValueError
from artifacts.quantizer import Quantizer
from artifacts.quantizers.identity import Identity
from artifacts.quantizers.predicted import Predicted
from artifacts.sites import Site
from calib.estimators.estimator import Fit
from calib.estimators.wrapping import WrappingEstimator
from calib.statistics.site_shape import SiteShape
from calib.statistics.site_statistics import SiteStatistics
from calib.statistics.sources import Shrinkage, Sources

_MOMENT_WEIGHTS = (0.0, 0.3, 1.0)

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Grid of the regularisation: coarse, as one choice serves a whole site."""

_CONSTANT = 1e-12
"""Variance, relative to the largest one, below which an input is constant."""

_JUDGED_CHANNELS = 128
"""Largest number of channels in the held-out error; one choice of regularisation serves all."""

NOTHING = Shrinkage(0.0, inf)

_LARGEST = torch.finfo(torch.float16).max

_TINY = torch.finfo(torch.float64).tiny

_FLOOR = 1e-6
"""Least channel weight, relative to their mean."""


@dataclass(frozen=True)
class NormalEquations:
    """Normal equations of a least-squares predictor.

    Parameters
    ----------
    inputs : Float[Tensor, "inputs inputs"]
        Covariance of the inputs.
    cross : Float[Tensor, "inputs channels"]
        Covariance of inputs and targets.
    """

    inputs: Float[Tensor, "inputs inputs"]
    cross: Float[Tensor, "inputs channels"]

    def mixed(self, other: "NormalEquations", weight: float) -> "NormalEquations":
        """Convex combination with other normal equations, whose weight is `weight`."""
        inputs = torch.lerp(self.inputs, other.inputs, weight)
        return NormalEquations(inputs, torch.lerp(self.cross, other.cross, weight))

    def single(self) -> "NormalEquations":
        """Normal equations in float32, which takes half the time."""
        return NormalEquations(self.inputs.float(), self.cross.float())

    def solve(self, ridge: float) -> Float[Tensor, "inputs channels"]:
        """Ridge predictor with a penalty relative to the variance of each input; constant inputs get weight zero.

        The predictor is zero for a covariance that is rounding alone, such as that of one token repeated.
        """
        # A = (S + r diag S)^-1 c (Hoerl and Kennard 1970, for standardised inputs). With D = diag(S)^(-1/2) it equals
        # D (D S D + r I)^-1 D c: a correlation matrix is better conditioned for Cholesky.
        variance = self.inputs.diagonal()
        scale = torch.where(variance > _CONSTANT * variance.max(), variance, torch.inf).rsqrt()
        scaled = scale[:, None] * self.inputs * scale
        scaled.diagonal().add_(ridge)
        # Not positive definite: rounding has eaten a covariance of (nearly) one token; predict nothing from it.
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if failed:
            return torch.zeros_like(self.cross)
        return scale[:, None] * torch.cholesky_solve(scale[:, None] * self.cross, factor)

    @classmethod
    def of(cls, u: Float[Tensor, "rows inputs"], x: Float[Tensor, "rows channels"]) -> "NormalEquations":
        """Normal equations of centred tokens."""
        return cls(u.mT @ u / len(u), u.mT @ x / len(u))


def fit_predictor(
    sources: Sources, x: Float32[Tensor, "rows channels"], shrinkage: Shrinkage
) -> Float64[Tensor, "inputs channels"]:
    """Matrix A of x ~ u A + bias with dequantized inputs u: regularised least squares on the reservoir.

    Parameters
    ----------
    sources : Sources
        Inputs.
    x : Float32[Tensor, "rows channels"]
        Reservoir tokens of the predicted site.
    shrinkage : Shrinkage
        Weight of the covariances of all tokens before quantization, and ridge penalty.
    """
    if shrinkage == NOTHING:
        return torch.zeros_like(sources.cross_covariance)
    sampled = NormalEquations.of(_centred(sources.decoded.double()), _centred(x.double()))
    exact = NormalEquations(sources.covariance, sources.cross_covariance)
    return sampled.mixed(exact, shrinkage.moment_weight).solve(shrinkage.ridge)


def held_out_shrinkage(
    sources: Sources, x: Float32[Tensor, "rows channels"], weights: Float64[Tensor, " channels"]
) -> Shrinkage:
    """Regularisation with the least error on the second half of the reservoir, fitted to the first half.

    The order of the reservoir is random. The prediction is zero if no predictor is better than the mean.

    Parameters
    ----------
    sources : Sources
        Inputs.
    x : Float32[Tensor, "rows channels"]
        Reservoir tokens of the predicted site.
    weights : Float64[Tensor, "channels"]
        Weight of a squared error in each channel.
    """
    # Hold-out instead of cross-validation: the reservoir has thousands of tokens, and one number is chosen from 13.
    half, stride = len(x) // 2, -(-x.shape[1] // _JUDGED_CHANNELS)
    if half < 2:
        return NOTHING
    u, x, weights = sources.decoded, x[:, ::stride], weights[::stride]
    first = NormalEquations.of(_centred(u[:half]), _centred(x[:half]))
    others = _without(sources, x, half, stride).single()
    u, wanted = u[half:] - u[:half].mean(dim=0), x[half:] - x[:half].mean(dim=0)
    errors = {NOTHING: _error(wanted, weights)}
    for weight in _MOMENT_WEIGHTS:
        mixed = first.mixed(others, weight)
        for ridge in _RIDGES:
            errors[Shrinkage(weight, ridge)] = _error(wanted - u @ mixed.solve(ridge), weights)
    return min(errors, key=lambda choice: errors[choice])


def _without(sources: Sources, x: Float32[Tensor, "rows channels"], half: int, stride: int) -> NormalEquations:
    """Normal equations of all full-precision tokens without the held-out half, which would bias its own error."""
    # Downdating: n S is the sum of u u^T over all n tokens, so subtract the products of the held-out ones.
    u, target = sources.exact[half:] - sources.mean.float(), x[half:] - sources.target_mean[::stride].float()
    n_left = max(1, sources.n_tokens - len(u))
    inputs = sources.n_tokens * sources.covariance - u.mT @ u
    cross = sources.n_tokens * sources.cross_covariance[:, ::stride] - u.mT @ target
    return NormalEquations(inputs / n_left, cross / n_left)


def _centred(rows: Float[Tensor, "rows _"]) -> Float[Tensor, "rows _"]:
    return rows - rows.mean(dim=0)


def _error(difference: Float32[Tensor, "rows channels"], weights: Float64[Tensor, " channels"]) -> float:
    return float((difference.double().square() @ weights).mean())


@final
class PredictedEstimator(WrappingEstimator):
    """Linear prediction of each token from the dequantized vectors of earlier sites; the residual is quantized.

    A site without sources, such as the keys of the first layer, is quantized without prediction.

    Parameters
    ----------
    from_sites : {'before', 'beside', 'both'}
        Inputs: keys and values of the layer before; the key of the same token and layer, for values; or both.
    rank_fraction : float or None
        Rank of the predictor as a fraction of the channels; None for full rank.

    References
    ----------
    arXiv 2501.19392, section 3.
    """

    method: Literal["predicted"] = "predicted"
    from_sites: Literal["before", "beside", "both"] = "both"
    rank_fraction: float | None = Field(default=None, gt=0, le=1)

    @property
    def needs_full(self) -> bool:
        """True: moments between sites are in the tier `full`."""
        return True

    def sources(self, site: Site, sites: Collection[Site]) -> tuple[Site, ...]:
        """Sites among `sites` that are the inputs of a site's predictor."""
        found = []
        if self.from_sites != "beside":
            found += [other for other in sites if other.layer == site.layer - 1]
        if self.from_sites != "before":
            found += [other for other in sites if other.layer == site.layer and other < site]
        return tuple(sorted(found))

    def fit(self, statistics: SiteStatistics) -> Fit:
        """Predictor from moments and the reservoir, with the inner fit on the residuals of the reservoir."""
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
        """Raises ValueError: predictors are fitted."""
        raise InvalidValueError("a predictor is fitted; calibrate first")

    def _predictor(
        self, sources: Sources, statistics: SiteStatistics, weight: Float64[Tensor, "inputs channels"]
    ) -> tuple[Predicted, Float32[Tensor, "rows channels"]]:
        """Predictor around the identity, and its predictions; the bias is the mean residual of the float16 weights."""
        rows, channels = statistics.rows, statistics.shape.channels
        expansion, rank = None, max(1, round((self.rank_fraction or 1) * channels))
        if rank * sum(weight.shape) < weight.numel():  # only if the two factors are smaller than A
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
        # Least squares of centred data: bias = mean(x) - mean(u) A, here with A as stored in float16 and on the grid.
        bias = (rows - unbiased).mean(dim=0)
        return replace(predicted, bias=bias), bias + unbiased


def _weights(statistics: SiteStatistics) -> Float64[Tensor, " channels"]:
    """Weight of a squared error in each channel: the energy of its queries, or 1."""
    energy = statistics.query_energy
    return torch.ones(statistics.shape.channels, dtype=torch.float64) if energy is None else energy


def _factors(
    weight: Float64[Tensor, "inputs channels"], sources: Sources, weights: Float64[Tensor, " channels"], rank: int
) -> tuple[Float64[Tensor, "inputs rank"], Float64[Tensor, "rank channels"]]:
    """Factors of the low-rank predictor with the least weighted change of the predictions."""
    # Reduced-rank regression (Izenman 1975): with V the leading eigenvectors of the covariance of the weighted
    # predictions u A W, W = diag(root), the best rank-r predictor is A W V V^T W^-1, by the Eckart-Young theorem.
    root = (weights / weights.mean().clamp_min(_TINY)).clamp_min(_FLOOR).sqrt()
    covariance = torch.cov(sources.decoded.double().mT, correction=0)
    predictions = (root[:, None] * (weight.mT @ covariance @ weight)) * root
    axes = torch.linalg.eigh(predictions).eigenvectors[:, -rank:].flip(1)
    return weight @ (root[:, None] * axes), axes.mT / root


def _half(matrix: Float64[Tensor, "rows columns"]) -> Float16[Tensor, "rows columns"]:
    return matrix.clamp(-_LARGEST, _LARGEST).half()
